// From a checked GEMM to a launched kernel: plan, tensor maps, instance.
#include "launch/fp8_gemm.h"

#include <algorithm>
#include <climits>

#include "device/counter.cuh"
#include "device/math.cuh"
#include "device/scheduler.cuh"
#include "launch/clear_rows.h"
#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/fp8_gemm_checks.h"
#include "launch/fp8_gemm_config.h"
#include "launch/launch.h"
#include "launch/scale_runs.h"
#include "launch/tensor_map.h"

namespace dso {

#define DSO_FP8_GEMM(...) extern template dso_status launch_fp8_gemm<__VA_ARGS__>(const Fp8GemmLaunch&);
#define DSO_FP8_SWAP_AB(...) extern template dso_status launch_fp8_swap_ab<__VA_ARGS__>(const Fp8GemmLaunch&);
#include "launch/fp8_gemm_configs.def"
#undef DSO_FP8_GEMM
#undef DSO_FP8_SWAP_AB

namespace {

using Launcher = dso_status (*)(const Fp8GemmLaunch&);
constexpr Launcher kLaunchers[] = {
#define DSO_FP8_GEMM(...) launch_fp8_gemm<__VA_ARGS__>,
#define DSO_FP8_SWAP_AB(...) launch_fp8_swap_ab<__VA_ARGS__>,
#include "launch/fp8_gemm_configs.def"
#undef DSO_FP8_GEMM
#undef DSO_FP8_SWAP_AB
};

/// One GEMM, or several: the dense one is a group by itself.
struct GroupedGemm {
    const dso_m_grouped_fp8_gemm& group;
    const dso_fp8_gemm& gemm;
    RowLayout row_layout;

    int64_t num_a_matrices() const { return row_layout == RowLayout::kMasked ? group.num_groups : 1; }
};

ScaleRuns scales_of_a(const GroupedGemm& x) {
    return {x.gemm.sfa,
            x.gemm.m,
            x.gemm.k,
            x.gemm.sfa_stride_m,
            x.gemm.sfa_stride_k,
            x.num_a_matrices(),
            x.group.sfa_stride_group};
}

/// A run starts at a multiple of 16 bytes; groups without padding start anywhere, which only the kernel for many rows
/// makes up for.
bool brings_sfa_by_tma(const GroupedGemm& x, const Fp8GemmConfig& tile) {
    if (x.row_layout == RowLayout::kOffsets && tile.swaps_operands) return false;
    return are_scale_runs(scales_of_a(x));
}

// Operands are tiles of rows of 128 bytes, under the swizzle that WGMMA reads.
dso_status encode_maps(const GroupedGemm& x, const Fp8GemmConfig& tile, bool has_wide_tiles, Fp8GemmLaunch& launch) {
    const dso_fp8_gemm& gemm = x.gemm;
    const dso_m_grouped_fp8_gemm& group = x.group;
    const int64_t k = gemm.k, matrices = x.num_a_matrices();
    Fp8GemmArguments& arguments = launch.arguments;
    const bool dense = x.row_layout == RowLayout::kDense;
    const auto encode_a = [&](int64_t box_rows, TensorMap* map) {
        return encode_tensor_map({gemm.a, matrices, gemm.m, k, group.a_stride_group, gemm.a_stride, 1,
                                  static_cast<int>(box_rows), 128, true},
                                 map);
    };
    const auto encode_b = [&](int box_rows, TensorMap* map) {
        return encode_tensor_map(
            {gemm.b, group.num_groups, gemm.n, k, group.b_stride_group, gemm.b_stride, 1, box_rows, 128, true}, map);
    };
    // A group's rows end anywhere: of what is not its own little should be loaded.
    const int box_rows = dense || tile.max_rows < 64 ? tile.max_rows : tile.swaps_operands ? tile.max_rows / 2 : 64;
    arguments.a_box_rows = static_cast<int>(dense ? std::min<int64_t>(gemm.m, box_rows) : box_rows);
    DSO_TRY(encode_a(arguments.a_box_rows, &launch.maps.a));
    arguments.has_high_boxes = !dense && tile.is_largest();
    if (arguments.has_high_boxes) DSO_TRY(encode_a(tile.max_rows, &launch.maps.other_a));
    // The last tiles may have half the columns.
    const bool halves = x.row_layout == RowLayout::kMasked && tile.swaps_operands && tile.block_n == 128;
    arguments.b_box_rows = halves ? tile.block_n / 2 : tile.block_n;
    DSO_TRY(encode_b(arguments.b_box_rows, &launch.maps.b));
    arguments.sfa_by_tma = brings_sfa_by_tma(x, tile);
    const bool stores_by_tma =
        !tile.swaps_operands && tile.block_n >= 64 && gemm.d_dtype == DSO_BF16 && !gemm.accumulate;
    launch.is_dense_by_tma =
        dense && tile.is_largest() && stores_by_tma && arguments.sfa_by_tma && gemm.m >= tile.max_rows;
    arguments.has_wide_tiles = launch.is_dense_by_tma && has_wide_tiles;
    if (arguments.has_wide_tiles) {
        DSO_TRY(encode_a(kLowRows, &launch.maps.other_a));
        DSO_TRY(encode_b(kWideBlocks * tile.block_n, &launch.maps.wide_b));
    }
    // A run of scales, and panels of 64 columns for 64 rows or, where rows may be another's, a warp's 16.
    const int scale_run = launch.is_dense_by_tma ? tile.max_rows : tile.scale_run();
    const int panel_rows = launch.is_dense_by_tma ? 64 : 16;
    if (stores_by_tma)
        DSO_TRY(encode_tensor_map(
            {gemm.d, matrices, gemm.m, gemm.n, group.d_stride_group, gemm.d_stride, 2, panel_rows, 64, true},
            &launch.maps.d));
    if (arguments.sfa_by_tma) DSO_TRY(encode_scale_runs(scales_of_a(x), scale_run, &launch.maps.sfa));
    return DSO_OK;
}

/// Whether to start while the kernel before ends. CTAs that start early take the SMs in the order in which these become
/// free. So a large GEMM's neighbouring tiles do not get neighbouring SMs, whose equal reads L2 would serve at once;
/// and where several CTAs share an SM, some SMs get more of them than others: a long kernel loses more by that than it
/// gains.
bool gains_by_overlap(const GroupedGemm& x, const Fp8GemmConfig& tile) {
    constexpr double kLarge = 2e10, kLong = 3.3e7;  // multiply-adds; bytes of weights
    const dso_fp8_gemm& gemm = x.gemm;
    const double matrix = static_cast<double>(gemm.n) * gemm.k;
    const bool is_masked = x.row_layout == RowLayout::kMasked;  // more a matter of memory
    if (!is_masked && matrix * static_cast<double>(gemm.m) > kLarge) return false;
    return tile.ctas_per_sm == 1 || matrix * static_cast<double>(std::max<int64_t>(x.group.num_groups, 1)) < kLong;
}

/// No more tiles than this, whatever the layout says.
int64_t most_tiles(const GroupedGemm& x, const Fp8GemmConfig& tile) {
    const int64_t num_n_blocks = ceil_div<int64_t>(x.gemm.n, tile.block_n);
    const int64_t num_row_blocks = ceil_div<int64_t>(x.gemm.m, tile.max_rows);
    switch (x.row_layout) {
        case RowLayout::kDense:
            return num_row_blocks * num_n_blocks;
        case RowLayout::kMasked:
            return num_row_blocks * num_n_blocks * x.group.num_groups;
        case RowLayout::kOffsets:
            return (num_row_blocks + x.group.num_groups) * num_n_blocks;
        default:
            return (num_row_blocks + ceil_div<int64_t>(x.gemm.m, kSegmentRows)) * num_n_blocks;
    }
}

/// Whether CTAs draw their tiles. Where these are of unequal height, a fixed order leaves some CTAs with more work than
/// others; after many tiles of a few large groups that evens out, and neighbours should keep to what they share in L2.
bool draws_tiles(const GroupedGemm& x, const Fp8GemmConfig& tile, int num_sms) {
    constexpr int64_t kFewRounds = 16;
    if (x.row_layout == RowLayout::kDense) return false;
    const int64_t num_tiles = most_tiles(x, tile), slots = int64_t{num_sms} * tile.ctas_per_sm;
    const int64_t most_draws = num_tiles + slots;  // some of the last tiles may be two halves
    if (num_tiles <= slots || most_draws >= int64_t{1} << kCountBits) return false;
    return x.row_layout == RowLayout::kMasked || num_tiles < kFewRounds * slots;
}

dso_status launch_by_plan(const GroupedGemm& x, const Fp8GemmPlan& plan, int device, int num_sms, dso_stream stream) {
    const dso_fp8_gemm& gemm = x.gemm;
    const dso_m_grouped_fp8_gemm& group = x.group;
    const Fp8GemmConfig& tile = plan.tile();
    const int64_t num_tiles = most_tiles(x, tile), slots = int64_t{num_sms} * tile.ctas_per_sm;
    if (num_tiles + slots > INT_MAX) return fail(DSO_INVALID, "fp8_gemm_nt: more than 2^31 tiles");

    Fp8GemmLaunch launch{};
    launch.stream = stream;
    launch.device = device;
    launch.cluster_size = plan.num_splits;
    launch.overlaps_predecessor = gains_by_overlap(x, tile);
    launch.num_ctas = static_cast<int>(plan.num_splits > 1 ? num_tiles * plan.num_splits : std::min(num_tiles, slots));
    Fp8GemmArguments& arguments = launch.arguments;
    arguments.schedule = {x.row_layout, group.layout, static_cast<int>(group.num_groups), static_cast<int>(gemm.m),
                          static_cast<int>(gemm.n)};
    arguments.k = static_cast<int>(gemm.k);
    arguments.b_is_constant = gemm.b_is_constant != 0;
    arguments.sfa = gemm.sfa;
    arguments.sfb = gemm.sfb;
    arguments.sfa_stride_matrix = group.sfa_stride_group;
    arguments.sfa_stride_m = gemm.sfa_stride_m;
    arguments.sfa_stride_k = gemm.sfa_stride_k;
    arguments.sfb_stride_matrix = group.sfb_stride_group;
    arguments.sfb_stride_n = gemm.sfb_stride_n;
    arguments.sfb_stride_k = gemm.sfb_stride_k;
    launch.output = {gemm.d, group.d_stride_group, gemm.d_stride, gemm.d_dtype == DSO_BF16, gemm.accumulate != 0};
    DSO_TRY(encode_maps(x, tile, plan.has_wide_tiles(gemm.m, gemm.n, num_sms), launch));
    if (gemm.workspace && draws_tiles(x, tile, num_sms))
        arguments.schedule.counter = static_cast<unsigned long long*>(gemm.workspace);
    if (plan.num_shared_tiles > 0 && launch.is_dense_by_tma && gemm.workspace) {
        auto* workspace = static_cast<uint8_t*>(gemm.workspace);
        launch.num_ctas = num_sms;
        arguments.num_shared_tiles = plan.num_shared_tiles;
        arguments.left_sums = reinterpret_cast<float*>(workspace);
        arguments.left = reinterpret_cast<uint64_t*>(workspace + SharingSpace(num_sms).sum_bytes);
    }
    return kLaunchers[plan.config](launch);
}

/// k = 0: the sum of nothing.
dso_status clear_output(const dso_fp8_gemm& gemm, dso_stream stream) {
    if (gemm.accumulate) return DSO_OK;
    const size_t element = gemm.d_dtype == DSO_BF16 ? 2 : 4;
    const size_t row_bytes = gemm.n * element;
    const size_t pitch = gemm.m > 1 ? gemm.d_stride * element : row_bytes;
    DSO_CUDA(cudaMemset2DAsync(gemm.d, pitch, 0, row_bytes, gemm.m, static_cast<cudaStream_t>(stream)));
    return DSO_OK;
}

dso_status launch_dense(const dso_fp8_gemm& gemm, const Fp8GemmPlan* plan, dso_stream stream) {
    DSO_TRY(check_fp8_gemm(gemm));
    if (gemm.m == 0 || gemm.n == 0) return DSO_OK;
    if (gemm.k == 0) return clear_output(gemm, stream);
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    if (plan && !is_possible(*plan, gemm.m, gemm.n, gemm.k, num_sms))
        return fail(DSO_INVALID, "fp8_gemm_nt: no such plan");
    dso_m_grouped_fp8_gemm group{};
    group.num_groups = 1;
    return launch_by_plan({group, gemm, RowLayout::kDense},
                          plan ? *plan : plan_fp8_gemm(gemm.m, gemm.n, gemm.k, gemm.batch_invariant != 0, num_sms),
                          device, num_sms, stream);
}

dso_status clear_rows(const dso_m_grouped_fp8_gemm& group, RowLayout row_layout, bool clears_owned, int num_sms,
                      dso_stream stream) {
    const dso_fp8_gemm& gemm = group.gemm;
    const int element = gemm.d_dtype == DSO_BF16 ? 2 : 4;
    const int64_t num_matrices = row_layout == RowLayout::kMasked ? group.num_groups : 1;
    const ClearRowsArguments arguments{{row_layout, group.layout, static_cast<int>(group.num_groups),
                                        static_cast<int>(gemm.m), static_cast<int>(gemm.n)},
                                       static_cast<uint8_t*>(gemm.d),
                                       num_matrices,
                                       group.d_stride_group * element,
                                       gemm.d_stride * element,
                                       gemm.n * element,
                                       clears_owned};
    return clear_rows(arguments, num_sms, stream);
}

dso_status launch_grouped(const dso_m_grouped_fp8_gemm& group, const Fp8GemmPlan* plan, dso_stream stream) {
    const dso_fp8_gemm& gemm = group.gemm;
    DSO_TRY(check_m_grouped_fp8_gemm(group));
    if (plan && !is_possible_grouped(*plan)) return fail(DSO_INVALID, "m_grouped_fp8_gemm_nt: no such plan");
    if (gemm.m == 0 || gemm.n == 0) return DSO_OK;
    const auto row_layout = static_cast<RowLayout>(group.row_layout);
    if (row_layout == RowLayout::kMasked && group.num_groups == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    if (group.clear_unowned) DSO_TRY(clear_rows(group, row_layout, false, num_sms, stream));
    if (group.num_groups == 0) return DSO_OK;
    if (gemm.k == 0) return gemm.accumulate ? DSO_OK : clear_rows(group, row_layout, true, num_sms, stream);
    return launch_by_plan({group, gemm, row_layout}, plan ? *plan : plan_grouped_fp8_gemm(group.expected_m), device,
                          num_sms, stream);
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_fp8_gemm_nt(const dso_fp8_gemm* gemm, dso_stream stream) {
    return dso::launch_dense(*gemm, nullptr, stream);
}

extern "C" dso_status dso_fp8_gemm_nt_by_plan(const dso_fp8_gemm* gemm, int config, int num_splits,
                                              int num_shared_tiles, dso_stream stream) {
    const dso::Fp8GemmPlan plan{config, num_splits, num_shared_tiles};
    return dso::launch_dense(*gemm, &plan, stream);
}

extern "C" dso_status dso_fp8_gemm_workspace(const dso_fp8_gemm* gemm, int64_t* num_bytes) {
    using namespace dso;
    *num_bytes = 0;
    DSO_TRY(check_fp8_gemm(*gemm));
    if (gemm->m == 0 || gemm->n == 0 || gemm->k == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    const Fp8GemmPlan plan = plan_fp8_gemm(gemm->m, gemm->n, gemm->k, gemm->batch_invariant != 0, num_sms);
    if (plan.num_shared_tiles > 0) *num_bytes = SharingSpace(num_sms).num_bytes();
    return DSO_OK;
}

extern "C" dso_status dso_m_grouped_fp8_gemm_nt(const dso_m_grouped_fp8_gemm* group, dso_stream stream) {
    return dso::launch_grouped(*group, nullptr, stream);
}

extern "C" dso_status dso_m_grouped_fp8_gemm_nt_by_plan(const dso_m_grouped_fp8_gemm* group, int config,
                                                        dso_stream stream) {
    const dso::Fp8GemmPlan plan{config, 1};
    return dso::launch_grouped(*group, &plan, stream);
}

extern "C" dso_status dso_m_grouped_fp8_gemm_workspace(const dso_m_grouped_fp8_gemm* group, int64_t* num_bytes) {
    using namespace dso;
    *num_bytes = 0;
    const dso_fp8_gemm& gemm = group->gemm;
    DSO_TRY(check_m_grouped_fp8_gemm(*group));
    if (gemm.m == 0 || gemm.n == 0 || gemm.k == 0 || group->num_groups == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    const GroupedGemm x{*group, gemm, static_cast<RowLayout>(group->row_layout)};
    if (draws_tiles(x, plan_grouped_fp8_gemm(group->expected_m).tile(), num_sms))
        *num_bytes = static_cast<int64_t>(sizeof(unsigned long long));
    return DSO_OK;
}
