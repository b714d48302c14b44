#include "launch/fp8_gemm_config.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <iterator>

#include "device/math.cuh"
#include "device/scheduler.cuh"
#include "device/stream_k.cuh"
#include "launch/deepseek_kernels.h"
#include "launch/status.h"

namespace dso {
namespace {

constexpr int kNumConfigs = static_cast<int>(std::size(kFp8GemmConfigs));

// Fitted to the times of all plans on an H200 (benchmarks/sweep_plans.py, docs/fp8_gemm.md), in microseconds. They are
// there to rank plans: taken by itself, none of them is a measurement.
constexpr double kLaunch = 1.29;
constexpr double kReduction = 0.42;      // of sums between two CTAs of a cluster
constexpr double kTallReduction = 3.26;  // where these are of 128 x 128
constexpr double kDoubling = 0.07;       // of their number
constexpr double kBytesPerMicrosecond = 4.40e6;
constexpr double kIdle = 0.34;       // SMs without a CTA are missed by the memory, too
constexpr double kSharing = 0.64;    // CTAs that share an SM hinder each other
constexpr double kReread = 0.06;     // of the memory's time, for each block of rows that reads the weights again
constexpr double kWide = 0.96;       // of the memory's time, where 128 rows of weights come together
constexpr double kExchange = -3.4;   // of sums through memory, where tiles are shared
constexpr double kSharedTile = 0.1;  // more, for each of these: their CTAs leave and take sums at the same time
constexpr double kPart = 1.7;        // more, for each CTA that has a part of the same tile: one adds them all up

struct Cost {
    double step;  // 128 of K, of a CTA that has its SM for itself
    double tile;  // its epilogue, and the first step of the next
};

constexpr Cost kCosts[] = {
    {0.231, 0.41}, {0.263, 0.62}, {0.46, 0.6},   {0.61, 0.8},    // tall; the larger two under the power limit
    {0.186, 0.79}, {0.118, 0.73},                                // tall, two groups that take steps in turn
    {0.232, 0.49}, {0.196, 0.17}, {0.308, 0.50}, {0.256, 0.68},  // swapped, 64 weights: 8 and 16 rows
    {0.393, 0.16}, {0.259, 1.06}, {0.300, 0.76}, {0.191, 0.97},  // 32 and 64 rows
    {0.174, 1.56}, {0.190, 1.78}, {0.420, 1.50}, {0.820, 1.21},  // 128 weights: 16, 32, 64 and 128 rows
    {0.46, 0.6},                                                 // tall, 128 x 128, whose k two CTAs can share
};
static_assert(std::size(kCosts) == kNumConfigs, "a line of fp8_gemm_configs.def each");

double estimated_time(const Fp8GemmPlan& plan, int64_t m, int64_t n, int64_t k, int num_sms) {
    const Fp8GemmConfig& tile = plan.tile();
    const Cost& cost = kCosts[plan.config];
    const int64_t num_row_blocks = ceil_div<int64_t>(m, tile.max_rows);
    const int64_t num_tiles = plan.num_tiles(m, n, num_sms), num_ctas = num_tiles * plan.num_splits;
    const bool ends_early = !tile.swaps_operands && tile.num_k_groups == 1 && plan.num_splits == 1;  // with half a step
    const double num_steps = ends_early
                                 ? 0.5 * static_cast<double>(ceil_div<int64_t>(k, 64))
                                 : static_cast<double>(ceil_div<int64_t>(ceil_div<int64_t>(k, 128), plan.num_splits));
    const bool shares_tiles = plan.num_shared_tiles > 0;
    const double num_rounds = shares_tiles
                                  ? static_cast<double>(num_tiles) / num_sms
                                  : static_cast<double>(ceil_div(num_ctas, int64_t{num_sms} * tile.ctas_per_sm));
    const int64_t sharing = std::min<int64_t>(tile.ctas_per_sm, ceil_div<int64_t>(num_ctas, num_sms));
    const double slower = 1 + kSharing * static_cast<double>(sharing - 1);
    const double bytes = static_cast<double>(n) * k + static_cast<double>(m) * k + 2.0 * m * n;
    const double idle = shares_tiles ? 0 : std::max(0.0, 1 - static_cast<double>(num_ctas) / num_sms);
    const bool is_wide = tile.swaps_operands && tile.block_n == 128;
    const double memory = bytes / kBytesPerMicrosecond * (1 + kIdle * idle) * (is_wide ? kWide : 1);
    const double reread = tile.swaps_operands ? kReread * static_cast<double>(num_row_blocks - 1) * memory : 0;
    const double work = num_rounds * (num_steps * cost.step * slower + cost.tile);
    const double reduction =
        tile.swaps_operands ? kReduction + kDoubling * (std::log2(plan.num_splits) - 1) : kTallReduction;
    const int shared = plan.num_shared_tiles;
    const double exchange = shared > 0            ? kExchange + kSharedTile * shared + kPart * num_sms / shared
                            : plan.num_splits > 1 ? reduction
                                                  : 0;
    return kLaunch + std::max(memory, work) + reread + exchange;
}

/// Clusters need their CTAs at once on neighbouring SMs: of larger ones fewer fit.
bool fits_at_once(const Fp8GemmPlan& plan, int64_t num_ctas, int num_sms) {
    const int percent = plan.num_splits <= 2 ? 100 : 91;
    return num_ctas <= int64_t{num_sms} * plan.tile().ctas_per_sm * percent / 100;
}

bool adds_in_order(const Fp8GemmPlan& plan) {
    return plan.num_splits == 1 && plan.tile().num_k_groups == 1 && plan.num_shared_tiles == 0;
}

/// The tiles that make no full wave, if they can be shared.
int64_t tiles_to_share(const Fp8GemmPlan& plan, int64_t m, int64_t n, int64_t k, int num_sms) {
    const int64_t left_over = plan.num_tiles(m, n, num_sms) % num_sms;
    return plan.tile().is_largest() && StreamKShape::fits(left_over, ceil_div<int64_t>(k, 128), num_sms) ? left_over
                                                                                                         : 0;
}

}  // namespace

bool Fp8GemmPlan::has_wide_tiles(int64_t m, int64_t n, int num_sms) const {
    // With fewer waves they save none, and where tiles are shared, fewer tiles are no simple fraction of the CTAs: 88
    // are two thirds of 132, and every third CTA is at the same step; of 86 none is where another is, which L2 likes
    // less.
    constexpr int kWaves = 2;
    return tile().is_largest() && ends_low(m, tile().max_rows) &&
           m / tile().max_rows * ceil_div<int64_t>(n, tile().block_n) >= int64_t{kWaves} * num_sms;
}

int64_t Fp8GemmPlan::num_tiles(int64_t m, int64_t n, int num_sms) const {
    const int64_t num_n_blocks = ceil_div<int64_t>(n, tile().block_n);
    if (!has_wide_tiles(m, n, num_sms)) return ceil_div<int64_t>(m, tile().max_rows) * num_n_blocks;
    return m / tile().max_rows * num_n_blocks + ceil_div<int64_t>(num_n_blocks, kWideBlocks);
}

bool is_possible(const Fp8GemmPlan& plan, int64_t m, int64_t n, int64_t k, int num_sms) {
    if (plan.config < 0 || plan.config >= kNumConfigs) return false;
    const int64_t num_tiles = plan.num_tiles(m, n, num_sms), num_steps = ceil_div<int64_t>(k, 128);
    if (plan.num_shared_tiles != 0)
        return plan.num_splits == 1 && plan.num_shared_tiles == tiles_to_share(plan, m, n, k, num_sms);
    if (plan.num_splits == 1) return true;
    if (plan.num_splits > plan.tile().most_splits ||
        (plan.num_splits != 2 && plan.num_splits != 4 && plan.num_splits != 8))
        return false;
    return num_steps >= plan.num_splits && num_tiles * plan.num_splits <= INT_MAX;
}

Fp8GemmPlan plan_fp8_gemm(int64_t m, int64_t n, int64_t k, bool batch_invariant, int num_sms) {
    Fp8GemmPlan best{0, 1};
    double least = estimated_time(best, m, n, k, num_sms);
    const auto consider = [&](const Fp8GemmPlan& plan) {
        const double time = estimated_time(plan, m, n, k, num_sms);
        if (time >= least) return;
        least = time;
        best = plan;
    };
    for (int config = 0; config < kNumConfigs; ++config) {
        const Fp8GemmConfig& tile = kFp8GemmConfigs[config];
        if (tile.swaps_operands && m > 2 * tile.max_rows) continue;
        if (tile.max_rows > 64 && tile.max_rows >= 2 * m) continue;  // half of it for nothing
        for (int num_splits = 1; num_splits <= tile.most_splits; num_splits *= 2) {
            const Fp8GemmPlan plan{config, num_splits};
            if (!is_possible(plan, m, n, k, num_sms) || (batch_invariant && !adds_in_order(plan))) continue;
            if (num_splits > 1 && !fits_at_once(plan, plan.num_tiles(m, n, num_sms) * num_splits, num_sms)) continue;
            consider(plan);
        }
        const Fp8GemmPlan whole{config, 1};
        const int64_t shared = batch_invariant ? 0 : tiles_to_share(whole, m, n, k, num_sms);
        if (shared > 0) consider({config, 1, static_cast<int>(shared)});
    }
    return best;
}

bool is_possible_grouped(const Fp8GemmPlan& plan) {
    return plan.config >= 0 && plan.config < kNumConfigs && adds_in_order(plan);
}

Fp8GemmPlan plan_grouped_fp8_gemm(int64_t rows_per_group) {
    // Whatever the guess, each group takes as many tiles as it has rows for; a bad one costs time only. Few rows are a
    // matter of reading the weights, once, by one CTA an SM whose ring is deep enough to read on between tiles. Some
    // groups have many more rows than others: a tile with room for twice as many, and 32, costs the small ones nothing
    // and spares the large ones a second reading. Beyond 64 rows the tensor core matters as much as the weights do.
    const bool is_many = rows_per_group > 64;
    const int64_t room = std::min<int64_t>(std::max<int64_t>(2 * rows_per_group, 32), 64);
    int best = -1;
    for (int config = 0; config < kNumConfigs; ++config) {
        const Fp8GemmConfig& tile = kFp8GemmConfigs[config];
        if (tile.swaps_operands == is_many || tile.num_k_groups > 1 || tile.ctas_per_sm > 1) continue;
        const bool is_better = best < 0 || tile.max_rows < kFp8GemmConfigs[best].max_rows;
        if (is_many ? tile.is_largest() : tile.max_rows >= room && is_better) best = config;
    }
    return {best, 1};
}

}  // namespace dso

extern "C" dso_status dso_plan_fp8_gemm(int64_t m, int64_t n, int64_t k, int batch_invariant, int num_sms,
                                        dso_fp8_gemm_plan* plan) {
    if (m < 1 || n < 1 || k < 1 || num_sms < 1)
        return dso::fail(DSO_INVALID, "a GEMM is planned for m, n, k and num_sms of at least 1");
    const dso::Fp8GemmPlan chosen = dso::plan_fp8_gemm(m, n, k, batch_invariant != 0, num_sms);
    const dso::Fp8GemmConfig& tile = chosen.tile();
    *plan = {chosen.config,       tile.max_rows,       tile.block_n,     tile.num_k_groups, tile.num_stages,
             tile.swaps_operands, tile.shared_bytes(), tile.most_splits, chosen.num_splits, chosen.num_shared_tiles};
    return DSO_OK;
}

extern "C" int64_t dso_fp8_gemm_sharing_bytes(int num_sms) { return dso::SharingSpace(num_sms).num_bytes(); }
