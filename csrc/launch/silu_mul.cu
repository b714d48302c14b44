#include "kernels/silu_mul.cuh"

#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/launch.h"
#include "launch/patch_grid.h"
#include "launch/row_checks.h"
#include "launch/silu_mul_checks.h"

namespace dso {
namespace {

constexpr int kTallPatch = 2;  // rows

template <typename T, bool kCast, int kRows, bool kVectorized>
dso_status launch_silu_mul(const SiluMulArguments& arguments, dso_stream stream) {
    const dim3 grid = patch_grid(arguments.num_groups, arguments.m, arguments.d, kRows);
    return launch_kernel(silu_mul_kernel<T, kCast, kRows, kVectorized>, {grid, kPatchThreads, 0, stream, 1, true},
                         arguments);
}

template <typename T, bool kCast>
dso_status launch_silu_mul(const SiluMulArguments& arguments, bool vectorized, int num_sms, dso_stream stream) {
    if (!vectorized) return launch_silu_mul<T, kCast, 1, false>(arguments, stream);
    const bool tall = fills_the_gpu(arguments.num_groups, arguments.m, arguments.d, kTallPatch, num_sms);
    return tall ? launch_silu_mul<T, kCast, kTallPatch, true>(arguments, stream)
                : launch_silu_mul<T, kCast, 1, true>(arguments, stream);
}

template <typename T>
dso_status launch_silu_mul(const SiluMulArguments& arguments, bool vectorized, int num_sms, dso_stream stream) {
    return arguments.output.q ? launch_silu_mul<T, true>(arguments, vectorized, num_sms, stream)
                              : launch_silu_mul<T, false>(arguments, vectorized, num_sms, stream);
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_silu_mul(const dso_swiglu* call, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_silu_mul(*call));
    if (call->num_groups == 0 || call->m == 0 || call->d == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    SiluMulArguments arguments{call->x,
                               call->y,
                               call->x_stride_group,
                               call->x_stride_m,
                               call->num_groups,
                               call->m,
                               call->d,
                               {static_cast<uint8_t*>(call->q), call->sf, call->sf_stride_group, call->sf_stride_m,
                                call->sf_stride_k, call->amax_floor, call->use_ue8m0 != 0}};
    if (groups_are_rows(*call, call->x_stride_group, call->x_stride_m) &&
        (!call->q || groups_are_rows(*call, call->sf_stride_group, call->sf_stride_m))) {
        arguments.m *= arguments.num_groups;
        arguments.num_groups = 1;
    }
    const bool vectorized = rows_are_aligned(call->x, call->x_dtype, call->x_stride_group, call->x_stride_m) &&
                            call->d % kChunk == 0 && reinterpret_cast<uintptr_t>(call->y) % 16 == 0 &&
                            reinterpret_cast<uintptr_t>(call->q) % kChunk == 0;
    switch (call->x_dtype) {
        case DSO_BF16:
            return launch_silu_mul<__nv_bfloat16>(arguments, vectorized, num_sms, stream);
        case DSO_F16:
            return launch_silu_mul<__half>(arguments, vectorized, num_sms, stream);
        default:
            return launch_silu_mul<float>(arguments, vectorized, num_sms, stream);
    }
}
