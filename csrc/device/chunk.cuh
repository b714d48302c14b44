// Eight neighbouring elements of a row: what a thread loads, rounds and stores at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "ptx/matrix.cuh"

namespace dso {

inline constexpr int kChunk = 8;

/// Eight elements as they lie in memory: 16 bytes, or 32 of float32.
template <typename T>
struct Chunk {
    uint4 vectors[sizeof(T) * kChunk / sizeof(uint4)];

    /// Two elements (one of float32).
    DSO_DEVICE uint32_t& word(int i) { return reinterpret_cast<uint32_t*>(vectors)[i]; }
    DSO_DEVICE uint32_t word(int i) const { return reinterpret_cast<const uint32_t*>(vectors)[i]; }
};

/// The first `count` of eight elements (all, if it is more; none, if it is negative), and zeros after them. Vectorized,
/// the eight are aligned to 16 bytes, and all or none of them exist.
template <bool kVectorized, typename T>
DSO_DEVICE Chunk<T> load_chunk(const T* source, int count) {
    Chunk<T> chunk{};
    if (kVectorized) {
        if (count > 0) {
#pragma unroll
            for (int i = 0; i < static_cast<int>(sizeof(chunk) / sizeof(uint4)); ++i)
                chunk.vectors[i] = reinterpret_cast<const uint4*>(source)[i];
        }
    } else if (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            if (i < count) chunk.word(i) = reinterpret_cast<const uint32_t*>(source)[i];
        }
    } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            if (i < count)
                chunk.word(i / 2) |= uint32_t{reinterpret_cast<const uint16_t*>(source)[i]} << (16 * (i % 2));
        }
    }
    return chunk;
}

/// The counterpart: stores the first `count` of eight elements.
template <bool kVectorized, typename T>
DSO_DEVICE void store_chunk(T* target, const Chunk<T>& chunk, int count) {
    if (kVectorized) {
        if (count > 0) {
#pragma unroll
            for (int i = 0; i < static_cast<int>(sizeof(chunk) / sizeof(uint4)); ++i)
                reinterpret_cast<uint4*>(target)[i] = chunk.vectors[i];
        }
    } else if (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            if (i < count) reinterpret_cast<uint32_t*>(target)[i] = chunk.word(i);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            if (i < count)
                reinterpret_cast<uint16_t*>(target)[i] = static_cast<uint16_t>(chunk.word(i / 2) >> (16 * (i % 2)));
        }
    }
}

DSO_DEVICE void to_floats(const Chunk<float>& chunk, float (&x)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = __uint_as_float(chunk.word(i));
}

DSO_DEVICE void to_floats(const Chunk<__nv_bfloat16>& chunk, float (&x)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
        x[2 * i] = __uint_as_float(chunk.word(i) << 16);
        x[2 * i + 1] = __uint_as_float(chunk.word(i) & 0xFFFF0000u);
    }
}

DSO_DEVICE void to_floats(const Chunk<__half>& chunk, float (&x)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
        x[2 * i] = __half2float(__ushort_as_half(static_cast<uint16_t>(chunk.word(i))));
        x[2 * i + 1] = __half2float(__ushort_as_half(static_cast<uint16_t>(chunk.word(i) >> 16)));
    }
}

DSO_DEVICE uint32_t pack_halves(float low, float high, __nv_bfloat16) { return ptx::pack_bf16x2(low, high); }
DSO_DEVICE uint32_t pack_halves(float low, float high, __half) {
    return __half_as_ushort(__float2half_rn(low)) | uint32_t{__half_as_ushort(__float2half_rn(high))} << 16;
}

/// Eight floats, each rounded to T.
template <typename T>
DSO_DEVICE Chunk<T> round_to(const float (&x)[kChunk]) {
    Chunk<T> chunk;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) chunk.word(i) = __float_as_uint(x[i]);
    } else {
#pragma unroll
        for (int i = 0; i < kChunk / 2; ++i) chunk.word(i) = pack_halves(x[2 * i], x[2 * i + 1], T{});
    }
    return chunk;
}

}  // namespace dso
