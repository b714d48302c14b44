#include "kernels/rms_norm.cuh"

#include <algorithm>

#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/launch.h"
#include "launch/patch_grid.h"
#include "launch/rms_norm_checks.h"
#include "launch/row_checks.h"

namespace dso {
namespace {

using NormKernel = void (*)(RmsNormArguments);

template <typename T, typename Weight, bool kAdd, bool kCast>
NormKernel select_kernel(const RmsNormShape& shape, bool vectorized) {
    if (!vectorized)
        return shape.num_chunks == 1   ? rms_norm_kernel<T, Weight, kAdd, kCast, 1, true, false>
               : shape.num_chunks == 2 ? rms_norm_kernel<T, Weight, kAdd, kCast, 2, true, false>
                                       : rms_norm_kernel<T, Weight, kAdd, kCast, kNormMaxChunks, false, false>;
    return shape.num_chunks == 1   ? rms_norm_kernel<T, Weight, kAdd, kCast, 1, true, true>
           : shape.num_chunks == 2 ? rms_norm_kernel<T, Weight, kAdd, kCast, 2, true, true>
           : shape.is_one_panel    ? rms_norm_kernel<T, Weight, kAdd, kCast, kNormMaxChunks, true, true>
                                   : rms_norm_kernel<T, Weight, kAdd, kCast, kNormMaxChunks, false, true>;
}

template <typename T, typename Weight>
NormKernel select_kernel(const dso_norm& norm, const RmsNormShape& shape, bool vectorized) {
    if (norm.residual)
        return norm.q ? select_kernel<T, Weight, true, true>(shape, vectorized)
                      : select_kernel<T, Weight, true, false>(shape, vectorized);
    return norm.q ? select_kernel<T, Weight, false, true>(shape, vectorized)
                  : select_kernel<T, Weight, false, false>(shape, vectorized);
}

NormKernel select_kernel(const dso_norm& norm, const RmsNormShape& shape, bool vectorized) {
    if (norm.x_dtype == DSO_F32) return select_kernel<float, float>(norm, shape, vectorized);
    const bool wide = norm.weight_dtype == DSO_F32;
    if (norm.x_dtype == DSO_F16)
        return wide ? select_kernel<__half, float>(norm, shape, vectorized)
                    : select_kernel<__half, __half>(norm, shape, vectorized);
    return wide ? select_kernel<__nv_bfloat16, float>(norm, shape, vectorized)
                : select_kernel<__nv_bfloat16, __nv_bfloat16>(norm, shape, vectorized);
}

template <typename T>
NormKernel select_ahead_kernel(bool casts) {
    return casts ? rms_norm_ahead_kernel<T, true> : rms_norm_ahead_kernel<T, false>;
}

NormKernel select_ahead_kernel(const dso_norm& norm) {
    return norm.x_dtype == DSO_F16 ? select_ahead_kernel<__half>(norm.q) : select_ahead_kernel<__nv_bfloat16>(norm.q);
}

template <typename T, bool kCast>
NormKernel select_warp_kernel(int warps) {
    return warps == 2 ? rms_norm_by_warp_kernel<T, kCast, 2> : rms_norm_by_warp_kernel<T, kCast, 3>;
}

NormKernel select_warp_kernel(const dso_norm& norm, int warps) {
    if (norm.x_dtype == DSO_F16)
        return norm.q ? select_warp_kernel<__half, true>(warps) : select_warp_kernel<__half, false>(warps);
    return norm.q ? select_warp_kernel<__nv_bfloat16, true>(warps) : select_warp_kernel<__nv_bfloat16, false>(warps);
}

/// Whether CTAs may go from row to row: the next row's registers are there, and it pays to hold them.
bool can_go_ahead(const RmsNormShape& shape) { return shape.is_one_panel && shape.num_chunks == kNormMaxChunks; }

/// Whether a warp may have a row that is several warps' otherwise, because it adds up as they do.
bool can_go_by_warp(const RmsNormShape& shape) {
    return shape.num_chunks == 2 && shape.num_threads > 32 && shape.num_threads <= 32 * 3;
}

constexpr int64_t kFewestWarps = 16;  // of an SM: with fewer rows than that, several warps share one

bool is_aligned(const void* pointer, int num_bytes) { return reinterpret_cast<uintptr_t>(pointer) % num_bytes == 0; }

bool all_rows_are_aligned(const dso_norm& norm) {
    return norm.d % kChunk == 0 && rows_are_aligned(norm.x, norm.x_dtype, norm.x_stride_group, norm.x_stride_m) &&
           (!norm.residual ||
            rows_are_aligned(norm.residual, norm.x_dtype, norm.residual_stride_group, norm.residual_stride_m)) &&
           is_aligned(norm.weight, 16) && is_aligned(norm.residual_out, 16) && is_aligned(norm.y, 16) &&
           is_aligned(norm.q, kChunk);
}

/// Rows of a CTA: short rows share one, as long as enough CTAs remain for the GPU. A row's bits do not depend on it.
int rows_of_a_cta(int threads_of_a_row, int64_t num_rows, int num_sms) {
    constexpr int kThreads = 256;
    const int rows = std::max(1, kThreads / threads_of_a_row);
    return num_rows >= int64_t{2} * rows * num_sms ? rows : 1;
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_rms_norm(const dso_norm* norm, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_rms_norm(*norm));
    if (norm->num_groups == 0 || norm->m == 0 || norm->d == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    RmsNormArguments arguments{norm->x,
                               norm->residual,
                               norm->weight,
                               norm->residual_out,
                               norm->y,
                               norm->x_stride_group,
                               norm->x_stride_m,
                               norm->residual_stride_group,
                               norm->residual_stride_m,
                               norm->num_groups,
                               norm->m,
                               norm->d,
                               0,
                               norm->eps,
                               1.f / static_cast<float>(norm->d),
                               {static_cast<uint8_t*>(norm->q), norm->sf, norm->sf_stride_group, norm->sf_stride_m,
                                norm->sf_stride_k, norm->amax_floor, norm->use_ue8m0 != 0}};
    if (groups_are_rows(*norm, norm->x_stride_group, norm->x_stride_m) &&
        (!norm->residual || groups_are_rows(*norm, norm->residual_stride_group, norm->residual_stride_m)) &&
        (!norm->q || groups_are_rows(*norm, norm->sf_stride_group, norm->sf_stride_m))) {
        arguments.m *= arguments.num_groups;
        arguments.num_groups = 1;
    }
    const RmsNormShape shape = rms_norm_shape(norm->d);
    const bool vectorized = all_rows_are_aligned(*norm);
    if (vectorized && !norm->residual && norm->x_dtype != DSO_F32 && norm->weight_dtype == norm->x_dtype &&
        arguments.num_groups == 1 && arguments.m < int64_t{1} << 31) {
        // As many CTAs as the SMs hold, unless that leaves them less than two rows each.
        const int64_t ahead_ctas = int64_t{num_sms} * (32 * kNormAheadWarps / shape.num_threads);
        if (can_go_ahead(shape) && arguments.m >= 2 * ahead_ctas) {
            const int shared_bytes = shape.num_threads * kNormMaxChunks * static_cast<int>(sizeof(uint4));
            return launch_kernel(
                select_ahead_kernel(*norm),
                {dim3(static_cast<unsigned>(ahead_ctas)), dim3(shape.num_threads), shared_bytes, stream, 1, true},
                arguments);
        }
        if (can_go_by_warp(shape) && arguments.m >= kFewestWarps * num_sms) {
            constexpr int kRows = kNormWarpThreads / 32;
            const int warps = shape.num_threads / 32;
            return launch_kernel(select_warp_kernel(*norm, warps),
                                 {dim3(static_cast<unsigned>(ceil_div<int64_t>(arguments.m, kRows))), dim3(32, kRows),
                                  0, stream, 1, true},
                                 arguments);
        }
    }
    const int rows = rows_of_a_cta(shape.num_threads, arguments.num_groups * arguments.m, num_sms);
    const int64_t ctas_per_group = ceil_div<int64_t>(arguments.m, rows);
    if (ctas_per_group * arguments.num_groups >= (int64_t{1} << 31))
        return fail(DSO_INVALID, "rms_norm: more than 2^31 rows");
    arguments.ctas_per_group = static_cast<uint32_t>(ctas_per_group);
    const dim3 grid(static_cast<unsigned>(ctas_per_group * arguments.num_groups));
    return launch_kernel(select_kernel(*norm, shape, vectorized),
                         {grid, dim3(shape.num_threads, rows), 0, stream, 1, true}, arguments);
}
