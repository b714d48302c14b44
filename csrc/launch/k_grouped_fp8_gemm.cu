// From a checked K-grouped GEMM to a launched kernel.
#include <algorithm>
#include <climits>

#include "kernels/sm90_k_grouped_fp8_gemm.cuh"
#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/fp8_gemm_checks.h"
#include "launch/launch.h"
#include "launch/scale_runs.h"
#include "launch/tensor_map.h"

namespace dso {
namespace {

using Shape = KGroupedFp8GemmShape;

dso_status encode_maps(const dso_k_grouped_fp8_gemm& group, bool scales_by_tma, KGroupedFp8GemmMaps& maps) {
    const dso_fp8_gemm& gemm = group.gemm;
    DSO_TRY(encode_tensor_map({gemm.a, 1, gemm.m, gemm.k, 0, gemm.a_stride, 1, Shape::BLOCK_M, 128, true}, &maps.a));
    DSO_TRY(encode_tensor_map({gemm.b, 1, gemm.n, gemm.k, 0, gemm.b_stride, 1, Shape::BLOCK_N, 128, true}, &maps.b));
    if (scales_by_tma) {
        DSO_TRY(encode_scale_runs({gemm.sfa, gemm.m, gemm.k, gemm.sfa_stride_m, gemm.sfa_stride_k}, Shape::BLOCK_M,
                                  &maps.sfa));
        DSO_TRY(encode_scale_runs({gemm.sfb, gemm.n, gemm.k, gemm.sfb_stride_n, gemm.sfb_stride_k}, Shape::BLOCK_N,
                                  &maps.sfb));
    }
    if (gemm.d_dtype == DSO_BF16 && !gemm.accumulate)
        DSO_TRY(encode_tensor_map(
            {gemm.d, group.num_groups, gemm.m, gemm.n, group.d_stride_group, gemm.d_stride, 2, 64, 64, true}, &maps.d));
    return DSO_OK;
}

/// No columns at all: each group's sum is that of nothing.
dso_status clear_output(const dso_k_grouped_fp8_gemm& group, dso_stream stream) {
    const dso_fp8_gemm& gemm = group.gemm;
    const size_t element = gemm.d_dtype == DSO_BF16 ? 2 : 4, row_bytes = gemm.n * element;
    const size_t pitch = gemm.m > 1 ? gemm.d_stride * element : row_bytes;
    for (int64_t i = 0; i < group.num_groups; ++i) {
        auto* d = static_cast<uint8_t*>(gemm.d) + i * group.d_stride_group * element;
        DSO_CUDA(cudaMemset2DAsync(d, pitch, 0, row_bytes, gemm.m, static_cast<cudaStream_t>(stream)));
    }
    return DSO_OK;
}

dso_status launch_k_grouped(const dso_k_grouped_fp8_gemm& group, dso_stream stream) {
    const dso_fp8_gemm& gemm = group.gemm;
    DSO_TRY(check_k_grouped_fp8_gemm(group));
    if (group.num_groups == 0 || gemm.m == 0 || gemm.n == 0) return DSO_OK;
    if (gemm.k == 0) return gemm.accumulate ? DSO_OK : clear_output(group, stream);

    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    const int64_t tiles_of_group =
        ceil_div<int64_t>(gemm.m, Shape::BLOCK_M) * ceil_div<int64_t>(gemm.n, Shape::BLOCK_N);
    if (tiles_of_group > (INT_MAX - num_sms) / group.num_groups)
        return fail(DSO_INVALID, "k_grouped_fp8_gemm_nt: more than 2^31 tiles");

    KGroupedFp8GemmArguments arguments;
    arguments.schedule = {group.k_offsets, static_cast<int>(group.num_groups), static_cast<int>(gemm.m),
                          static_cast<int>(gemm.n), static_cast<int>(gemm.k)};
    arguments.sfa = {gemm.sfa, gemm.sfa_stride_m, gemm.sfa_stride_k};
    arguments.sfb = {gemm.sfb, gemm.sfb_stride_n, gemm.sfb_stride_k};
    arguments.scales_by_tma = are_scale_runs({gemm.sfa, gemm.m, gemm.k, gemm.sfa_stride_m, gemm.sfa_stride_k}) &&
                              are_scale_runs({gemm.sfb, gemm.n, gemm.k, gemm.sfb_stride_n, gemm.sfb_stride_k});
    KGroupedFp8GemmMaps maps{};
    DSO_TRY(encode_maps(group, arguments.scales_by_tma, maps));
    const DirectOutput output{gemm.d, group.d_stride_group, gemm.d_stride, gemm.d_dtype == DSO_BF16,
                              gemm.accumulate != 0};

    constexpr auto kernel = sm90_k_grouped_fp8_gemm_kernel<Shape>;
    constexpr int kSharedBytes = sizeof(KGroupedFp8GemmShared<Shape>);
    DSO_TRY(allow_shared_memory<kernel>(device, kSharedBytes));
    const int num_ctas = static_cast<int>(std::min<int64_t>(tiles_of_group * group.num_groups, num_sms));
    return launch_kernel(kernel, {dim3(num_ctas), dim3(Shape::kNumThreads), kSharedBytes, stream}, maps, arguments,
                         output);
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_k_grouped_fp8_gemm_nt(const dso_k_grouped_fp8_gemm* group, dso_stream stream) {
    return dso::launch_k_grouped(*group, stream);
}
