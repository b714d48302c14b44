// The softmax over tiles of keys, one after the other, of the rows of a WGMMA accumulator.
//
// Scores are exponentiated to base 2 against the largest so far. Where a tile has a larger one, all that was summed
// before is to be multiplied by `correction`. Source: "Online normalizer calculation for softmax", arXiv:1805.02867.
#pragma once

#include "ptx/math.cuh"
#include "ptx/types.cuh"

namespace dso {

inline constexpr float kMinusInfinity = -__builtin_huge_valf();
inline constexpr float kLn2 = 0.693147180559945309f;

/// The two rows, eight apart, that four lanes share.
struct SoftmaxRows {
    float top[2] = {kMinusInfinity, kMinusInfinity};  // the largest score, the same in the four lanes
    float sum[2] = {};                                // of the exponentials of this lane's columns

    /// What exponents of row `i` are relative to: finite, though no key may have been visible yet.
    DSO_DEVICE float base(int i, float scale_log2) const {
        return top[i] == kMinusInfinity ? 0.f : top[i] * scale_log2;
    }

    /// Turns a tile's scores, -inf where a key is not visible, into exp2(scale_log2 * score - base). A NaN among them
    /// stays one, and so becomes the sum.
    template <int kCount>
    DSO_DEVICE void add_tile(float (&scores)[kCount], float scale_log2, float (&correction)[2]) {
        float largest[2];
        find_largest(scores, largest);
        exponentiate(scores, scale_log2, largest, correction);
    }

    /// The first half of `add_tile`: the largest scores of the four lanes so far. Between the halves warps that have
    /// different columns of the same rows may agree on those of all.
    template <int kCount>
    DSO_DEVICE void find_largest(const float (&scores)[kCount], float (&largest)[2]) const {
        // Both rows at once, step by step: each step's results take a while.
#pragma unroll
        for (int i = 0; i < 2; ++i) largest[i] = top[i];
#pragma unroll
        for (int j = 0; j < kCount; j += 2)
            largest[j / 2 % 2] = fmaxf(largest[j / 2 % 2], fmaxf(scores[j], scores[j + 1]));
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {
            const float upper = __shfl_xor_sync(0xFFFFFFFF, largest[0], distance);
            const float lower = __shfl_xor_sync(0xFFFFFFFF, largest[1], distance);
            largest[0] = fmaxf(largest[0], upper);
            largest[1] = fmaxf(largest[1], lower);
        }
    }

    template <int kCount>
    DSO_DEVICE void exponentiate(float (&scores)[kCount], float scale_log2, const float (&largest)[2],
                                 float (&correction)[2]) {
        float new_base[2], tile_sum[2][2] = {};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float old = top[i] * scale_log2;
            top[i] = largest[i];
            new_base[i] = base(i, scale_log2);
            correction[i] = ptx::exp2(old - new_base[i]);
        }
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            const int i = j / 2 % 2;
            scores[j] = ptx::exp2(__fmaf_rn(scores[j], scale_log2, -new_base[i]));
            tile_sum[i][j % 2] += scores[j];
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) sum[i] = __fmaf_rn(sum[i], correction[i], tile_sum[i][0] + tile_sum[i][1]);
    }

    /// The sums over all columns, to all four lanes.
    DSO_DEVICE void finish() {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int distance = 1; distance < 4; distance *= 2) sum[i] += __shfl_xor_sync(0xFFFFFFFF, sum[i], distance);
        }
    }
};

/// Multiplies the two rows of an accumulator by a factor each; nothing happens where the warp's are all 1.
template <int kCount>
DSO_DEVICE void scale_rows(float (&x)[kCount], float upper, float lower) {
    if (!__any_sync(0xFFFFFFFF, upper != 1.f || lower != 1.f)) return;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
        x[i + 0] *= upper;
        x[i + 1] *= upper;
        x[i + 2] *= lower;
        x[i + 3] *= lower;
    }
}

/// The softmax of one part of the keys: its exponentials are relative to `base`, in base 2. No key was visible where
/// `sum` is 0, and `base` is -inf then.
struct alignas(16) SoftmaxPart {
    float base, sum;
    float rounded_sum;  // of the exponentials as they were multiplied
};

/// What a part's sums are to be multiplied by so that they are relative to `base`; 0 where it is empty, but for NaN.
DSO_DEVICE float weight_of(const SoftmaxPart& part, float base) {
    return part.base == kMinusInfinity ? 0.f : ptx::exp2(part.base - base);
}

/// 1 / sum, by which outputs are multiplied; those without a key are 0 already.
DSO_DEVICE float inverse_of(float sum) { return sum == 0.f ? 0.f : 1.f / sum; }

/// The logarithm to base 2 of a sum of exponentials relative to `base`; -inf where there are none.
DSO_DEVICE float log2_sum(float base, float sum) { return sum == 0.f ? kMinusInfinity : base + log2f(sum); }

}  // namespace dso
