// The rotation of four pairs of channels that a thread holds: the rule of deepseek_ops/rope.py, bit for bit.
//
// A row of d channels has d / 2 pairs: neighbours (2i, 2i + 1) where it is interleaved, else (i, i + d / 2). Four pairs
// are eight channels in either case: one chunk, or two halves of one.
#pragma once

#include "device/chunk.cuh"

namespace dso {

inline constexpr int kRotaryPairs = kChunk / 2;  // of a thread

/// Four numbers as they lie in memory, the first `count` of them, and zeros after them.
template <bool kVectorized>
DSO_DEVICE float4 load_angles(const float* source, int count) {
    if (kVectorized) return count > 0 ? *reinterpret_cast<const float4*>(source) : float4{};
    return {count > 0 ? source[0] : 0.f, count > 1 ? source[1] : 0.f, count > 2 ? source[2] : 0.f,
            count > 3 ? source[3] : 0.f};
}

/// The cosines and sines of four pairs from `pair` on, in a row of `half` cosines and as many sines.
struct RotaryAngles {
    float4 cos, sin;
};
template <bool kVectorized>
DSO_DEVICE RotaryAngles load_rotary_angles(const float* row, int pair, int half) {
    return {load_angles<kVectorized>(row + pair, half - pair),
            load_angles<kVectorized>(row + half + pair, half - pair)};
}

/// Four pairs from `pair` on of a row of `half` pairs, those there are: (a0, b0, a1, b1, ...) where interleaved, else
/// (a0, ..., a3, b0, ..., b3). Vectorized, the row is aligned to 16 bytes, and `half` is a multiple of four.
template <bool kVectorized, typename T>
DSO_DEVICE Chunk<T> load_pairs(const T* row, int pair, int half, bool interleaved) {
    if (interleaved) return load_chunk<kVectorized>(row + 2 * pair, 2 * (half - pair));
    Chunk<T> chunk{};
    constexpr int kWords = kRotaryPairs * sizeof(T) / sizeof(uint2);
    if (kVectorized) {
        if (pair < half) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                const uint2 a = reinterpret_cast<const uint2*>(row + pair)[i];
                const uint2 b = reinterpret_cast<const uint2*>(row + half + pair)[i];
                chunk.word(2 * i) = a.x, chunk.word(2 * i + 1) = a.y;
                chunk.word(2 * (kWords + i)) = b.x, chunk.word(2 * (kWords + i) + 1) = b.y;
            }
        }
        return chunk;
    }
    const Chunk<T> a = load_chunk<false>(row + pair, min(half - pair, kRotaryPairs));
    const Chunk<T> b = load_chunk<false>(row + half + pair, min(half - pair, kRotaryPairs));
#pragma unroll
    for (int i = 0; i < 2 * kWords; ++i) chunk.word(i) = a.word(i), chunk.word(2 * kWords + i) = b.word(i);
    return chunk;
}

/// The counterpart of load_pairs.
template <bool kVectorized, typename T>
DSO_DEVICE void store_pairs(T* row, const Chunk<T>& chunk, int pair, int half, bool interleaved) {
    if (interleaved) {
        store_chunk<kVectorized>(row + 2 * pair, chunk, 2 * (half - pair));
        return;
    }
    constexpr int kWords = kRotaryPairs * sizeof(T) / sizeof(uint2);
    if (kVectorized) {
        if (pair < half) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
                reinterpret_cast<uint2*>(row + pair)[i] = make_uint2(chunk.word(2 * i), chunk.word(2 * i + 1));
                reinterpret_cast<uint2*>(row + half + pair)[i] =
                    make_uint2(chunk.word(2 * (kWords + i)), chunk.word(2 * (kWords + i) + 1));
            }
        }
        return;
    }
    Chunk<T> b{};
#pragma unroll
    for (int i = 0; i < 2 * kWords; ++i) b.word(i) = chunk.word(2 * kWords + i);
    store_chunk<false>(row + pair, chunk, min(half - pair, kRotaryPairs));
    store_chunk<false>(row + half + pair, b, min(half - pair, kRotaryPairs));
}

/// (a, b) turned by an angle. No multiply-add: each product is rounded, as in the reference.
DSO_DEVICE void rotate(float& a, float& b, float cos, float sin) {
    const float turned = __fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin));
    b = __fadd_rn(__fmul_rn(a, sin), __fmul_rn(b, cos));
    a = turned;
}

/// Four pairs, as load_pairs brings them, turned by their angles.
DSO_DEVICE void rotate_pairs(float (&x)[kChunk], const RotaryAngles& angles, bool interleaved) {
    const auto [cos, sin] = angles;
    if (interleaved) {
        rotate(x[0], x[1], cos.x, sin.x);
        rotate(x[2], x[3], cos.y, sin.y);
        rotate(x[4], x[5], cos.z, sin.z);
        rotate(x[6], x[7], cos.w, sin.w);
    } else {
        rotate(x[0], x[4], cos.x, sin.x);
        rotate(x[1], x[5], cos.y, sin.y);
        rotate(x[2], x[6], cos.z, sin.z);
        rotate(x[3], x[7], cos.w, sin.w);
    }
}

/// The row of a table of angles that a position has: positions outside it count as its first or last.
DSO_DEVICE int64_t clamp_position(int64_t position, int64_t max_position) {
    return max(int64_t{0}, min(position, max_position - 1));
}

}  // namespace dso
