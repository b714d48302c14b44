// From chunks in registers to e4m3 and scales, for blocks that a few lanes of a warp hold together.
#pragma once

#include "device/chunk.cuh"
#include "device/quantize.cuh"

namespace dso {

inline constexpr int kQuantizeBlock = 128;

DSO_DEVICE float larger_half(__nv_bfloat162 x) { return fmaxf(__low2float(x), __high2float(x)); }
DSO_DEVICE float larger_half(__half2 x) { return fmaxf(__low2float(x), __high2float(x)); }

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

/// The largest magnitude of some chunks, NaN left out (0 where there is nothing else). Of 16-bit elements two at a
/// time.
template <typename T, int kChunks>
DSO_DEVICE float amax_of(const Chunk<T> (&chunks)[kChunks]) {
    if constexpr (sizeof(T) == 4) {
        float amax = 0.f;
#pragma unroll
        for (int i = 0; i < kChunks * kChunk; ++i)  // fmaxf passes over NaN, and so does __hmax2
            amax = fmaxf(amax, fabsf(__uint_as_float(chunks[i / kChunk].word(i % kChunk))));
        return amax;
    } else {
        using Pair = typename PairOf<T>::Type;
        constexpr int kPairs = kChunk / 2;
        Pair amax{T{}, T{}};
#pragma unroll
        for (int i = 0; i < kChunks * kPairs; ++i) {
            const uint32_t word = chunks[i / kPairs].word(i % kPairs);
            amax = __hmax2(amax, __habs2(reinterpret_cast<const Pair&>(word)));
        }
        return larger_half(amax);
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

/// What each lane of a block's lanes has after their blocks are scaled.
template <int kBlocks>
struct BlockScales {
    float sf;                // of the block whose number is the lane's modulo kBlocks
    float inverse[kBlocks];  // of all
};

/// The scales of kBlocks blocks of 128, of each of which kLanes neighbouring lanes hold a part. The lanes divide the
/// blocks among them, so that each makes one pair of divisions and has one scale to store. All 32 lanes must take part.
template <int kLanes, int kBlocks, typename T>
DSO_DEVICE BlockScales<kBlocks> scale_blocks(const Chunk<T> (&x)[kBlocks][kQuantizeBlock / kChunk / kLanes],
                                             float amax_floor, bool use_ue8m0) {
    static_assert(kBlocks <= kLanes && (kBlocks & (kBlocks - 1)) == 0, "each block needs a lane that divides for it");
    float amax[kBlocks];
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) amax[block] = amax_of(x[block]);
    // Lanes that differ in bit `half` swap halves of their blocks: each keeps the half that its bit names.
#pragma unroll
    for (int half = kBlocks / 2; half > 0; half /= 2) {
        const bool upper = threadIdx.x & half;
#pragma unroll
        for (int block = 0; block < half; ++block) {
            const float kept = upper ? amax[block + half] : amax[block];
            const float given = upper ? amax[block] : amax[block + half];
            amax[block] = fmaxf(kept, __shfl_xor_sync(0xFFFFFFFF, given, half));
        }
    }
#pragma unroll
    for (int offset = kBlocks; offset < kLanes; offset *= 2)
        amax[0] = fmaxf(amax[0], __shfl_xor_sync(0xFFFFFFFF, amax[0], offset));
    const BlockScale scale = block_scale(amax[0], amax_floor, use_ue8m0);

    BlockScales<kBlocks> scales;
    scales.sf = scale.sf;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
        scales.inverse[block] = __shfl_sync(0xFFFFFFFF, scale.inverse, block, kBlocks);
    return scales;
}

}  // namespace dso
