// Promotion: the FP8 numerics in one place.
//
// Hopper's tensor core keeps about 14 bits of an FP8 product's running sum. So after each 128 of K (one scale block)
// the partial sum is taken out, multiplied by the scales of its A row and B block, and added up in float32 registers.
// Source: DeepSeek-V3 report, arXiv:2412.19437, section 3.3.2.
#pragma once

#include "ptx/types.cuh"

namespace dso {

/// sum += scale * partial for a WGMMA accumulator; a thread's elements lie in two rows, eight apart.
template <int kCount>
DSO_DEVICE void promote(float (&sum)[kCount], const float (&partial)[kCount], float upper_scale, float lower_scale) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
        sum[i + 0] += upper_scale * partial[i + 0];
        sum[i + 1] += upper_scale * partial[i + 1];
        sum[i + 2] += lower_scale * partial[i + 2];
        sum[i + 3] += lower_scale * partial[i + 3];
    }
}

/// sum = scale * partial: the first of several, which needs no sums of zero.
template <int kCount>
DSO_DEVICE void begin_promotion(float (&sum)[kCount], const float (&partial)[kCount], float upper_scale,
                                float lower_scale) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)  // -0 becomes +0, as it does where it is added
        sum[i] = __fmaf_rn(i % 4 < 2 ? upper_scale : lower_scale, partial[i], 0.f);
}

/// The same as `promote` where the tile's columns have the scales: `scales_of(j)` are those of columns 8 * j + 2 *
/// (lane % 4) and of the next one.
template <int kCount, typename ScalesOf>
DSO_DEVICE void promote_columns(float (&sum)[kCount], const float (&partial)[kCount], const ScalesOf& scales_of) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
        const float2 scales = scales_of(j);
        sum[4 * j + 0] += scales.x * partial[4 * j + 0];
        sum[4 * j + 1] += scales.y * partial[4 * j + 1];
        sum[4 * j + 2] += scales.x * partial[4 * j + 2];
        sum[4 * j + 3] += scales.y * partial[4 * j + 3];
    }
}

/// The same where rows and columns have scales. `column_scales` points to those of columns 2 * (lane % 4) onward, in
/// shared memory: a thread needs a quarter of them, more than it has registers for.
template <int kCount>
DSO_DEVICE void promote_outer(float (&sum)[kCount], const float (&partial)[kCount], float upper_scale,
                              float lower_scale, const float* column_scales) {
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
        const float2 column = *reinterpret_cast<const float2*>(column_scales + 8 * j);
        sum[4 * j + 0] += (upper_scale * column.x) * partial[4 * j + 0];
        sum[4 * j + 1] += (upper_scale * column.y) * partial[4 * j + 1];
        sum[4 * j + 2] += (lower_scale * column.x) * partial[4 * j + 2];
        sum[4 * j + 3] += (lower_scale * column.y) * partial[4 * j + 3];
    }
}

}  // namespace dso
