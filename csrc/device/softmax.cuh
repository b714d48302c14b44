// The softmax over tiles of keys, one after the other, of the rows of a WGMMA accumulator.
//
// Scores are exponentiated to base 2 against a base that is near the largest so far. Where a tile moves it, all that
// was summed before is to be multiplied by `correction`. Source: "Online normalizer calculation for softmax",
// arXiv:1805.02867.
#pragma once

#include "ptx/math.cuh"
#include "ptx/types.cuh"

namespace dso {

inline constexpr float kMinusInfinity = -__builtin_huge_valf();
inline constexpr float kLn2 = 0.693147180559945309f;

/// How far, as a power of two, exponentials may exceed 1 before their base is moved: rarely, and float16 holds their
/// sum.
inline constexpr float kSoftmaxHeadroom = 8.f;

/// The two rows, eight apart, that four lanes share.
struct SoftmaxRows {
    static constexpr int kCallsBetween = 9;  // after the largest scores, and after each eighth of the exponentials

    float top[2] = {kMinusInfinity, kMinusInfinity};  // the score that is the base, the same in the four lanes
    float sum[2] = {};                                // of the exponentials of this lane's columns

    /// What exponents of row `i` are relative to: finite, though no key may have been visible yet.
    DSO_DEVICE float base(int i, float scale_log2) const {
        return top[i] == kMinusInfinity ? 0.f : top[i] * scale_log2;
    }

    /// Turns a tile's scores, -inf where a key is not visible, into exp2(scale_log2 * score - base). A NaN among them
    /// stays one, and so becomes the sum. Most tiles leave the base where it is: then the lanes need not agree on the
    /// largest score, nor anybody multiply by a correction. `between` is called for work that is to be under way
    /// meanwhile, with the number of the call.
    template <int kCount, typename Between>
    DSO_DEVICE void add_tile(float (&scores)[kCount], float scale_log2, float (&correction)[2],
                             const Between& between) {
        float largest[2] = {top[0], top[1]};
        find_largest_of_lane(scores, largest);
        const bool rises[2] = {is_above(largest[0], 0, scale_log2), is_above(largest[1], 1, scale_log2)};
        correction[0] = correction[1] = 1.f;
        if (__any_sync(0xFFFFFFFF, rises[0] || rises[1])) {
            agree_on_largest(largest);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (is_above(largest[i], i, scale_log2)) correction[i] = move_base(i, largest[i], scale_log2);
            }
        }
        between(0);
        exponentiate(scores, scale_log2, correction, between);
    }

    /// The same in two halves, always against the largest score; between them, warps that have different columns of the
    /// same rows may agree on those of all. First the largest of the four lanes so far,
    template <int kCount>
    DSO_DEVICE void find_largest(const float (&scores)[kCount], float (&largest)[2]) const {
        largest[0] = top[0], largest[1] = top[1];
        find_largest_of_lane(scores, largest);
        agree_on_largest(largest);
    }

    /// then the exponentials.
    template <int kCount>
    DSO_DEVICE void exponentiate(float (&scores)[kCount], float scale_log2, const float (&largest)[2],
                                 float (&correction)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) correction[i] = move_base(i, largest[i], scale_log2);
        exponentiate(scores, scale_log2, correction, [](int) {});
    }

    /// The sums over all columns, to all four lanes.
    DSO_DEVICE void finish() {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int distance = 1; distance < 4; distance *= 2) sum[i] += __shfl_xor_sync(0xFFFFFFFF, sum[i], distance);
        }
    }

  private:
    DSO_DEVICE bool is_above(float score, int i, float scale_log2) const {
        return (score - top[i]) * scale_log2 > kSoftmaxHeadroom;
    }

    /// Returns what was summed before is to be multiplied by.
    DSO_DEVICE float move_base(int i, float score, float scale_log2) {
        const float old = top[i] * scale_log2;
        top[i] = score;
        return ptx::exp2(old - base(i, scale_log2));
    }

    // Both rows at once, step by step: each step's results take a while.
    template <int kCount>
    DSO_DEVICE static void find_largest_of_lane(const float (&scores)[kCount], float (&largest)[2]) {
#pragma unroll
        for (int j = 0; j < kCount; j += 2)
            largest[j / 2 % 2] = fmaxf(largest[j / 2 % 2], fmaxf(scores[j], scores[j + 1]));
    }

    DSO_DEVICE static void agree_on_largest(float (&largest)[2]) {
#pragma unroll
        for (int distance = 1; distance < 4; distance *= 2) {
            const float upper = __shfl_xor_sync(0xFFFFFFFF, largest[0], distance);
            const float lower = __shfl_xor_sync(0xFFFFFFFF, largest[1], distance);
            largest[0] = fmaxf(largest[0], upper);
            largest[1] = fmaxf(largest[1], lower);
        }
    }

    template <int kCount, typename Between>
    DSO_DEVICE void exponentiate(float (&scores)[kCount], float scale_log2, const float (&correction)[2],
                                 const Between& between) {
        const float base_of[2] = {base(0, scale_log2), base(1, scale_log2)};
        float tile_sum[2][2] = {};
        constexpr int kEighth = kCount / (kCallsBetween - 1);
#pragma unroll
        for (int j = 0; j < kCount; ++j) {
            const int i = j / 2 % 2;
            scores[j] = ptx::exp2(__fmaf_rn(scores[j], scale_log2, -base_of[i]));
            tile_sum[i][j % 2] += scores[j];
            if ((j + 1) % kEighth == 0) between((j + 1) / kEighth);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) sum[i] = __fmaf_rn(sum[i], correction[i], tile_sum[i][0] + tile_sum[i][1]);
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
