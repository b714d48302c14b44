#include "kernels/fp8_quantize.cuh"

#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/fp8_quantize_checks.h"
#include "launch/launch.h"
#include "launch/patch_grid.h"
#include "launch/row_checks.h"

namespace dso {
namespace {

constexpr int kTallPatch = 4;  // rows

template <typename T, int kRows, bool kVectorized>
dso_status launch_per_token_cast(const PerTokenCastArguments& arguments, dso_stream stream) {
    const dim3 grid = patch_grid(arguments.num_groups, arguments.m, arguments.k, kRows);
    return launch_kernel(per_token_cast_to_fp8_kernel<T, kRows, kVectorized>, {grid, kPatchThreads, 0, stream, 1, true},
                         arguments);
}

template <typename T>
dso_status launch_per_token_cast(const PerTokenCastArguments& arguments, bool vectorized, int num_sms,
                                 dso_stream stream) {
    if (!vectorized) return launch_per_token_cast<T, 1, false>(arguments, stream);
    const bool tall = fills_the_gpu(arguments.num_groups, arguments.m, arguments.k, kTallPatch, num_sms);
    return tall ? launch_per_token_cast<T, kTallPatch, true>(arguments, stream)
                : launch_per_token_cast<T, 1, true>(arguments, stream);
}

template <typename T>
dso_status launch_per_block_cast(const PerBlockCastArguments& arguments, bool vectorized, dso_stream stream) {
    const dim3 grid = grid_of(ceil_div<int64_t>(arguments.k, kQuantizeBlock),
                              ceil_div<int64_t>(arguments.n, kQuantizeBlock), arguments.num_groups);
    const auto kernel = vectorized ? per_block_cast_to_fp8_kernel<T, true> : per_block_cast_to_fp8_kernel<T, false>;
    return launch_kernel(kernel, {grid, kPerBlockThreads, 0, stream, 1, true}, arguments);
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_per_token_cast_to_fp8(const dso_per_token_cast* cast, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_per_token_cast(*cast));
    if (cast->num_groups == 0 || cast->m == 0 || cast->k == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    PerTokenCastArguments arguments{cast->x,
                                    cast->x_stride_group,
                                    cast->x_stride_m,
                                    cast->num_groups,
                                    cast->m,
                                    cast->k,
                                    {static_cast<uint8_t*>(cast->q), cast->sf, cast->sf_stride_group, cast->sf_stride_m,
                                     cast->sf_stride_k, cast->amax_floor, cast->use_ue8m0 != 0}};
    if (groups_are_rows(*cast, cast->x_stride_group, cast->x_stride_m) &&
        groups_are_rows(*cast, cast->sf_stride_group, cast->sf_stride_m)) {
        arguments.m *= arguments.num_groups;
        arguments.num_groups = 1;
    }
    const bool vectorized = rows_are_aligned(cast->x, cast->x_dtype, cast->x_stride_group, cast->x_stride_m) &&
                            cast->k % kChunk == 0 && reinterpret_cast<uintptr_t>(cast->q) % kChunk == 0;
    switch (cast->x_dtype) {
        case DSO_BF16:
            return launch_per_token_cast<__nv_bfloat16>(arguments, vectorized, num_sms, stream);
        case DSO_F16:
            return launch_per_token_cast<__half>(arguments, vectorized, num_sms, stream);
        default:
            return launch_per_token_cast<float>(arguments, vectorized, num_sms, stream);
    }
}

extern "C" dso_status dso_per_block_cast_to_fp8(const dso_per_block_cast* cast, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_per_block_cast(*cast));
    if (cast->num_groups == 0 || cast->n == 0 || cast->k == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    const PerBlockCastArguments arguments{
        cast->x, static_cast<uint8_t*>(cast->q), cast->sf,         cast->num_groups, cast->n,
        cast->k, cast->x_stride_group,           cast->x_stride_n, cast->amax_floor, cast->use_ue8m0 != 0};
    const bool vectorized = rows_are_aligned(cast->x, cast->x_dtype, cast->x_stride_group, cast->x_stride_n) &&
                            cast->k % kChunk == 0 && reinterpret_cast<uintptr_t>(cast->q) % kChunk == 0;
    switch (cast->x_dtype) {
        case DSO_BF16:
            return launch_per_block_cast<__nv_bfloat16>(arguments, vectorized, stream);
        case DSO_F16:
            return launch_per_block_cast<__half>(arguments, vectorized, stream);
        default:
            return launch_per_block_cast<float>(arguments, vectorized, stream);
    }
}
