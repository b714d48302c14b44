// From a checked grouped bfloat16 GEMM to a launched kernel: tile, tensor maps, instance.
#include <algorithm>
#include <climits>
#include <iterator>

#include "device/math.cuh"
#include "kernels/sm90_bf16_gemm_swap_ab.cuh"
#include "launch/bf16_gemm_checks.h"
#include "launch/bf16_gemm_config.h"
#include "launch/clear_rows.h"
#include "launch/device_info.h"
#include "launch/launch.h"
#include "launch/tensor_map.h"

namespace dso {
namespace {

RowSchedule schedule_of(const dso_m_grouped_bf16_gemm& gemm) {
    return {RowLayout::kOffsets, gemm.offsets, static_cast<int>(gemm.num_groups), static_cast<int>(gemm.m),
            static_cast<int>(gemm.n)};
}

template <typename Shape>
dso_status encode_maps(const dso_m_grouped_bf16_gemm& gemm, Bf16GemmMaps& maps) {
    DSO_TRY(encode_tensor_map({gemm.a, 1, gemm.m, gemm.k, 0, gemm.a_stride, 2, Shape::kBoxRows, Shape::BLOCK_K, true},
                              &maps.a));
    return encode_tensor_map({gemm.b, gemm.num_groups, gemm.n, gemm.k, gemm.b_stride_group, gemm.b_stride, 2,
                              Shape::BLOCK_N, Shape::BLOCK_K, true},
                             &maps.b);
}

template <int kMaxRows, int BLOCK_N, int kNumStages>
dso_status launch_bf16_swap_ab(const dso_m_grouped_bf16_gemm& gemm, int device, int num_sms, dso_stream stream) {
    using Shape = Bf16SwapAbShape<kMaxRows, BLOCK_N, kNumStages>;
    constexpr int kSharedBytes = sizeof(Bf16SwapAbShared<Shape>);
    static_assert(kSharedBytes <= Bf16GemmConfig{kMaxRows, BLOCK_N, kNumStages}.shared_bytes(),
                  "the host's view of a tile is the kernel's");
    constexpr auto kernel = sm90_bf16_gemm_swap_ab_kernel<Shape>;

    // No more tiles than this, whatever the offsets say.
    const int64_t num_row_blocks = std::min(gemm.m, ceil_div<int64_t>(gemm.m, kMaxRows) + gemm.num_groups);
    const int64_t num_n_blocks = ceil_div<int64_t>(gemm.n, BLOCK_N);
    if (num_row_blocks > (INT_MAX - num_sms) / num_n_blocks)
        return fail(DSO_INVALID, "m_grouped_bf16_gemm_nt: more than 2^31 tiles");

    Bf16GemmMaps maps{};
    DSO_TRY(encode_maps<Shape>(gemm, maps));
    const Bf16GemmArguments arguments{schedule_of(gemm), static_cast<int>(gemm.k), static_cast<uint16_t*>(gemm.d),
                                      gemm.d_stride, gemm.clear_unowned != 0};
    DSO_TRY(allow_shared_memory<kernel>(device, kSharedBytes));
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(num_row_blocks * num_n_blocks, num_sms)));
    return launch_kernel(kernel, {grid, dim3(Shape::kNumThreads), kSharedBytes, stream, 1, true}, maps, arguments);
}

using Launcher = dso_status (*)(const dso_m_grouped_bf16_gemm&, int device, int num_sms, dso_stream);
constexpr Launcher kLaunchers[] = {
#define DSO_BF16_SWAP_AB(...) launch_bf16_swap_ab<__VA_ARGS__>,
#include "launch/bf16_gemm_configs.def"
#undef DSO_BF16_SWAP_AB
};

/// No products: the sum of nothing in the rows of a group, where there are groups.
dso_status clear_output(const dso_m_grouped_bf16_gemm& gemm, int num_sms, dso_stream stream) {
    ClearRowsArguments arguments{
        schedule_of(gemm), static_cast<uint8_t*>(gemm.d), 1, 0, gemm.d_stride * 2, gemm.n * 2, false};
    if (gemm.clear_unowned) DSO_TRY(clear_rows(arguments, num_sms, stream));
    arguments.clears_owned = true;
    return gemm.num_groups == 0 ? DSO_OK : clear_rows(arguments, num_sms, stream);
}

dso_status launch_by_plan(const dso_m_grouped_bf16_gemm& gemm, int config, dso_stream stream) {
    DSO_TRY(check_m_grouped_bf16_gemm(gemm));
    if (config < 0 || config >= static_cast<int>(std::size(kLaunchers)))
        return fail(DSO_INVALID, "m_grouped_bf16_gemm_nt: no such plan");
    if (gemm.m == 0 || gemm.n == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    if (gemm.num_groups == 0 || gemm.k == 0) return clear_output(gemm, num_sms, stream);
    return kLaunchers[config](gemm, device, num_sms, stream);
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_m_grouped_bf16_gemm_nt(const dso_m_grouped_bf16_gemm* gemm, dso_stream stream) {
    const int64_t rows_per_group = gemm->num_groups > 0 ? dso::ceil_div(gemm->m, gemm->num_groups) : 0;
    return dso::launch_by_plan(*gemm, dso::choose_bf16_gemm_config(rows_per_group), stream);
}

extern "C" dso_status dso_m_grouped_bf16_gemm_nt_by_plan(const dso_m_grouped_bf16_gemm* gemm, int config,
                                                         dso_stream stream) {
    return dso::launch_by_plan(*gemm, config, stream);
}
