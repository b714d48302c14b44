#include "kernels/fp8_quantize.cuh"

#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/fp8_quantize_checks.h"
#include "launch/launch.h"

namespace dso {
namespace {

template <typename T>
bool rows_are_aligned(const PerTokenCastArguments& arguments) {
    constexpr int kElements = 16 / sizeof(T);  // of a 16-byte load
    return reinterpret_cast<uintptr_t>(arguments.x) % 16 == 0 && arguments.x_stride_m % kElements == 0 &&
           arguments.x_stride_group % kElements == 0 && arguments.k % kElementsPerLane == 0 &&
           reinterpret_cast<uintptr_t>(arguments.q) % 8 == 0;
}

template <typename T>
dso_status launch_per_token_cast(const PerTokenCastArguments& arguments, int num_sms, dso_stream stream) {
    constexpr int kBlocksPerCta = kQuantizeThreads / kLanesPerBlock, kCtasPerSm = 8;
    const int64_t num_blocks = arguments.num_groups * arguments.m * ceil_div<int64_t>(arguments.k, kQuantizeBlock);
    const int64_t num_ctas = ceil_div<int64_t>(num_blocks, kBlocksPerCta);
    const int grid = num_ctas < num_sms * kCtasPerSm ? static_cast<int>(num_ctas) : num_sms * kCtasPerSm;
    const auto kernel =
        rows_are_aligned<T>(arguments) ? per_token_cast_to_fp8_kernel<T, true> : per_token_cast_to_fp8_kernel<T, false>;
    return launch_kernel(kernel, {grid, kQuantizeThreads, 0, stream}, arguments);
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_per_token_cast_to_fp8(const dso_per_token_cast* cast, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_per_token_cast(*cast));
    if (cast->num_groups == 0 || cast->m == 0 || cast->k == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    const PerTokenCastArguments arguments{cast->x,
                                          static_cast<uint8_t*>(cast->q),
                                          cast->sf,
                                          cast->num_groups,
                                          cast->m,
                                          cast->k,
                                          cast->x_stride_group,
                                          cast->x_stride_m,
                                          cast->sf_stride_group,
                                          cast->sf_stride_m,
                                          cast->sf_stride_k,
                                          cast->amax_floor,
                                          cast->use_ue8m0 != 0,
                                          cast->sf_stride_m == 1 && cast->m > 1};
    switch (cast->x_dtype) {
        case DSO_BF16:
            return launch_per_token_cast<__nv_bfloat16>(arguments, num_sms, stream);
        case DSO_F16:
            return launch_per_token_cast<__half>(arguments, num_sms, stream);
        default:
            return launch_per_token_cast<float>(arguments, num_sms, stream);
    }
}
