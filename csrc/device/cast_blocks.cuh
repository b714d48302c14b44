// From chunks in registers to e4m3 and scales, for blocks that a few lanes of a warp hold together.
#pragma once

#include "device/chunk.cuh"
#include "device/quantize.cuh"

namespace dso {

inline constexpr int kQuantizeBlock = 128;

template <typename T>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
    using Type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
    using Type = __half2;
};

/// The larger ones of two pairs of 16-bit floats, which a word holds; NaN only where both are.
template <typename T>
DSO_DEVICE uint32_t larger_pair(uint32_t x, uint32_t y) {
    using Pair = typename PairOf<T>::Type;
    const Pair larger = __hmax2(reinterpret_cast<const Pair&>(x), reinterpret_cast<const Pair&>(y));
    return reinterpret_cast<const uint32_t&>(larger);
}

template <typename T>
DSO_DEVICE float larger_half(uint32_t pair) {
    using Pair = typename PairOf<T>::Type;
    return fmaxf(__low2float(reinterpret_cast<const Pair&>(pair)), __high2float(reinterpret_cast<const Pair&>(pair)));
}

/// The largest magnitudes of 16-bit elements of some chunks, the even ones' and the odd ones'. NaN is left out, and 0
/// is the least.
template <typename T, int kChunks>
DSO_DEVICE uint32_t amax_pair(const Chunk<T> (&chunks)[kChunks]) {
    using Pair = typename PairOf<T>::Type;
    constexpr int kPairs = kChunk / 2;
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < kChunks * kPairs; ++i) {
        const uint32_t word = chunks[i / kPairs].word(i % kPairs);
        const Pair magnitudes = __habs2(reinterpret_cast<const Pair&>(word));
        amax = larger_pair<T>(amax, reinterpret_cast<const uint32_t&>(magnitudes));
    }
    return amax;
}

/// The largest magnitude of some chunks, likewise. Of 16-bit elements two at a time.
template <typename T, int kChunks>
DSO_DEVICE float amax_of(const Chunk<T> (&chunks)[kChunks]) {
    if constexpr (sizeof(T) == 2) {
        return larger_half<T>(amax_pair(chunks));
    } else {
        float amax = 0.f;
#pragma unroll
        for (int i = 0; i < kChunks * kChunk; ++i)  // fmaxf passes over NaN, and so does __hmax2
            amax = fmaxf(amax, fabsf(__uint_as_float(chunks[i / kChunk].word(i % kChunk))));
        return amax;
    }
}

/// Eight values times `inverse`, as e4m3.
DSO_DEVICE uint2 cast_floats(const float (&x)[kChunk], float inverse) {
    uint32_t pairs[kChunk / 2];
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) pairs[i] = ptx::pack_e4m3x2(x[2 * i] * inverse, x[2 * i + 1] * inverse);
    return make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
}

/// Eight elements times `inverse`, rounded once in float32, then to e4m3.
template <typename T>
DSO_DEVICE uint2 cast_chunk(const Chunk<T>& chunk, float inverse) {
    float x[kChunk];
    to_floats(chunk, x);
    return cast_floats(x, inverse);
}

/// The first `count` of eight e4m3 values; vectorized, all or none of them exist, and they are aligned to 8 bytes.
template <bool kVectorized>
DSO_DEVICE void store_e4m3(uint8_t* target, uint2 values, int count) {
    if (kVectorized) {
        if (count > 0) *reinterpret_cast<uint2*>(target) = values;
    } else {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
            if (i < count) target[i] = static_cast<uint8_t>((i < 4 ? values.x : values.y) >> (8 * (i % 4)));
        }
    }
}

/// The largest magnitude of the block whose number is the lane's modulo kShares, a power of two: 0 from kBlocks on.
/// kLanes neighbouring lanes hold a part of each block. All 32 lanes must take part.
template <int kLanes, int kShares, typename T, int kBlocks, int kChunks>
DSO_DEVICE float amax_of_own_block(const Chunk<T> (&x)[kBlocks][kChunks]) {
    // Of 16-bit elements a word has the largest of two blocks, which one shuffle takes along and one maximum compares.
    constexpr int kPerWord = sizeof(T) == 2 && kShares > 1 ? 2 : 1;
    const auto larger = [](uint32_t a, uint32_t b) {
        if constexpr (kPerWord == 2) {
            return larger_pair<T>(a, b);
        } else {
            return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
        }
    };
    uint32_t amax[kShares / kPerWord];
#pragma unroll
    for (int i = 0; i < kShares / kPerWord; ++i) {
        if constexpr (kPerWord == 2) {
            const uint32_t even = amax_pair(x[2 * i]), odd = 2 * i + 1 < kBlocks ? amax_pair(x[2 * i + 1]) : 0;
            amax[i] = larger_pair<T>(__byte_perm(even, odd, 0x5410), __byte_perm(even, odd, 0x7632));
        } else {
            amax[i] = i < kBlocks ? __float_as_uint(amax_of(x[i])) : 0;
        }
    }
    // Lanes that differ in bit `half` swap halves of their blocks: each keeps the half that its bit names.
#pragma unroll
    for (int half = kShares / 2; half >= kPerWord; half /= 2) {
        const bool upper = threadIdx.x & half;
#pragma unroll
        for (int i = 0; i < half / kPerWord; ++i) {
            const uint32_t kept = upper ? amax[i + half / kPerWord] : amax[i];
            const uint32_t given = upper ? amax[i] : amax[i + half / kPerWord];
            amax[i] = larger(kept, __shfl_xor_sync(0xFFFFFFFF, given, half));
        }
    }
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) {
        if (offset < kPerWord || offset >= kShares)
            amax[0] = larger(amax[0], __shfl_xor_sync(0xFFFFFFFF, amax[0], offset));
    }
    if constexpr (kPerWord == 2) {
        const auto& own = reinterpret_cast<const typename PairOf<T>::Type&>(amax[0]);
        return threadIdx.x & 1 ? __high2float(own) : __low2float(own);
    } else {
        return __uint_as_float(amax[0]);
    }
}

/// What each lane of a block's lanes has after their kBlocks blocks are scaled.
template <int kBlocks>
struct BlockScales {
    float sf;                // of the block whose number is the lane's among its blocks' lanes
    float inverse[kBlocks];  // of all
};

/// The scales of kBlocks blocks of 128, of each of which kLanes neighbouring lanes hold a part. The lanes divide the
/// blocks among them, so that each makes one pair of divisions and has one scale to store. All 32 lanes must take part.
template <int kLanes, int kBlocks, typename T>
DSO_DEVICE BlockScales<kBlocks> scale_blocks(const Chunk<T> (&x)[kBlocks][kQuantizeBlock / kChunk / kLanes],
                                             float amax_floor, bool use_ue8m0) {
    constexpr int kShares = kBlocks == 3 ? 4 : kBlocks;
    static_assert(kShares <= kLanes && (kShares & (kShares - 1)) == 0, "each block needs a lane that divides for it");
    const BlockScale scale = block_scale(amax_of_own_block<kLanes, kShares>(x), amax_floor, use_ue8m0);

    BlockScales<kBlocks> scales;
    scales.sf = scale.sf;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
        scales.inverse[block] = __shfl_sync(0xFFFFFFFF, scale.inverse, block, kShares);
    return scales;
}

}  // namespace dso
