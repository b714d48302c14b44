// The FP8 GEMM's host side, for a million shapes: what is refused, the tile chosen, and every limit of the hardware.
#include <climits>
#include <cmath>
#include <iterator>
#include <random>
#include <vector>

#include "device/math.cuh"
#include "expect.h"
#include "launch/deepseek_kernels.h"
#include "launch/fp8_gemm_checks.h"
#include "launch/fp8_gemm_config.h"

namespace {

constexpr int kSharedLimit = 232448;  // bytes that one CTA can have on sm_90
constexpr int kSharedOfSm = 233472;   // of which each CTA takes 1 KB more than it asks for
constexpr int kBoxLimit = 256;        // rows of a TMA box
constexpr int64_t kIntMax = INT_MAX;

long long num_plans = 0;

alignas(128) unsigned char memory[128];

dso_fp8_gemm gemm_of(int64_t m, int64_t n, int64_t k) {
    dso_fp8_gemm gemm{};
    gemm.a = gemm.b = gemm.d = memory;
    gemm.sfa = gemm.sfb = reinterpret_cast<const float*>(memory);
    gemm.m = m, gemm.n = n, gemm.k = k;
    gemm.a_stride = gemm.b_stride = k, gemm.d_stride = n;
    gemm.sfa_stride_m = 1, gemm.sfa_stride_k = m, gemm.sfb_stride_n = 1, gemm.sfb_stride_k = 1;
    gemm.d_dtype = DSO_BF16;
    return gemm;
}

void plan(int64_t m, int64_t n, int64_t k, bool batch_invariant, int num_sms) {
    const dso::Fp8GemmPlan plan = dso::plan_fp8_gemm(m, n, k, batch_invariant, num_sms);
    EXPECT(dso::is_possible(plan, m, n, k, num_sms), "config %d, %d splits for %lld x %lld x %lld", plan.config,
           plan.num_splits, static_cast<long long>(m), static_cast<long long>(n), static_cast<long long>(k));
    const dso::Fp8GemmConfig& tile = plan.tile();
    EXPECT(!batch_invariant || (plan.num_splits == 1 && tile.num_k_groups == 1 && plan.num_shared_tiles == 0),
           "%d splits, %d groups along k, %d shared tiles", plan.num_splits, tile.num_k_groups, plan.num_shared_tiles);

    const int64_t num_m_blocks = dso::ceil_div<int64_t>(m, tile.max_rows);
    const int64_t num_n_blocks = dso::ceil_div<int64_t>(n, tile.block_n);
    const int64_t num_tiles = num_m_blocks * num_n_blocks, slots = int64_t{num_sms} * tile.ctas_per_sm;
    // A CTA's next tile is computed in int, and may lie one grid past the last tile.
    EXPECT(num_tiles >= 1 && num_tiles * plan.num_splits + slots <= kIntMax, "%lld tiles for %lld x %lld",
           static_cast<long long>(num_tiles), static_cast<long long>(m), static_cast<long long>(n));
    // Those that share tiles have two more pieces each, and one past the last.
    EXPECT(plan.num_shared_tiles == 0 || num_tiles + 3 * int64_t{num_sms} <= kIntMax, "%lld tiles for %lld x %lld",
           static_cast<long long>(num_tiles), static_cast<long long>(m), static_cast<long long>(n));
    // The CTAs of a cluster must find room at the same time.
    EXPECT(plan.num_splits == 1 || num_tiles * plan.num_splits <= slots, "%lld CTAs in clusters of %d",
           static_cast<long long>(num_tiles * plan.num_splits), plan.num_splits);
    // TMA coordinates are ints, also those of the rows and columns that a last tile has beyond the matrix.
    EXPECT(num_m_blocks * tile.max_rows <= kIntMax, "m %lld", static_cast<long long>(m));
    EXPECT(num_n_blocks * tile.block_n <= kIntMax, "n %lld", static_cast<long long>(n));
    EXPECT(dso::ceil_div<int64_t>(k, 128) * 128 <= kIntMax, "k %lld", static_cast<long long>(k));
    ++num_plans;
}

// Accepted shapes can be planned on every GPU; what is refused says why.
void accept(int64_t m, int64_t n, int64_t k) {
    EXPECT(dso::check_fp8_gemm(gemm_of(m, n, k)) == DSO_OK, "%lld x %lld x %lld: %s", static_cast<long long>(m),
           static_cast<long long>(n), static_cast<long long>(k), dso_last_error());
    if (m && n && k)
        for (const bool batch_invariant : {false, true})
            for (const int num_sms : {1, 132}) plan(m, n, k, batch_invariant, num_sms);
}

template <typename Change>
void refuse(const char* words, Change change) {
    dso_fp8_gemm gemm = gemm_of(256, 256, 256);
    change(gemm);
    EXPECT(dso::check_fp8_gemm(gemm) == DSO_INVALID, "accepted: %s", words);
    bool found = false;
    for (const char* at = dso_last_error(); *at && !found; ++at) {
        const char *x = at, *y = words;
        while (*y && *x == *y) ++x, ++y;
        found = !*y;
    }
    EXPECT(found, "\"%s\" does not say \"%s\"", dso_last_error(), words);
}

void check_configs() {
    for (const dso::Fp8GemmConfig& tile : dso::kFp8GemmConfigs) {
        EXPECT(tile.shared_bytes() <= kSharedLimit, "%d x %d, %d stages: %d bytes", tile.max_rows, tile.block_n,
               tile.num_stages, tile.shared_bytes());
        EXPECT((tile.shared_bytes() + 1024) * tile.ctas_per_sm <= kSharedOfSm, "%d CTAs of %d bytes", tile.ctas_per_sm,
               tile.shared_bytes());
        EXPECT(tile.max_rows <= kBoxLimit && tile.block_n <= kBoxLimit, "%d x %d", tile.max_rows, tile.block_n);
        EXPECT(tile.max_rows % 8 == 0 && tile.block_n % 32 == 0 && 128 % tile.block_n == 0, "%d x %d", tile.max_rows,
               tile.block_n);
        EXPECT(tile.num_stages >= 2 && tile.num_stages % tile.num_k_groups == 0, "%d stages", tile.num_stages);
    }
    // Every number of rows of a group has a tile, and few rows one with room for as many again.
    for (int64_t rows = 1; rows < 10000; ++rows) {
        const dso::Fp8GemmPlan plan = dso::plan_grouped_fp8_gemm(rows);
        EXPECT(plan.tile().swaps_operands == (rows <= 64) && plan.tile().ctas_per_sm == 1, "%lld rows",
               static_cast<long long>(rows));
        EXPECT(plan.num_splits == 1 &&
                   (plan.tile().max_rows >= std::min<int64_t>(2 * rows, 64) || !plan.tile().swaps_operands),
               "%lld rows", static_cast<long long>(rows));
        EXPECT(!plan.tile().swaps_operands || plan.tile().num_k_groups == 1, "%lld rows", static_cast<long long>(rows));
    }
}

}  // namespace

int main() {
    check_configs();

    // Every m from a decode step to a prefill at the (n, k) of DeepSeek-V3's projections, and those that others missed.
    const int64_t projections[][2] = {{2112, 7168}, {24576, 1536}, {32768, 512},  {7168, 16384},  {4096, 7168},
                                      {7168, 2048}, {7168, 1152},  {1536, 768},   {768, 1536},    {576, 7168},
                                      {7168, 2304}, {36864, 7168}, {7168, 18432}, {129280, 7168}, {8, 16}};
    for (const auto& [n, k] : projections)
        for (int64_t m = 1; m <= 8192; m += m < 600 ? 1 : 7) accept(m, n, k);
    std::mt19937_64 random(1);
    const auto extent = [&](int64_t most, int64_t multiple) {
        const double exponent = std::generate_canonical<double, 32>(random);
        return multiple * (1 + static_cast<int64_t>(std::pow(static_cast<double>(most / multiple - 1), exponent)));
    };
    for (int i = 0; i < 250000; ++i) accept(extent(1 << 20, 1), extent(1 << 20, 8), extent(1 << 20, 16));

    // Empty extents, and the largest that one dimension can have.
    const int64_t large = (int64_t{1} << 31) - 1024;
    accept(0, 8, 16), accept(8, 0, 16), accept(8, 8, 0);
    accept(large, 8, 16), accept(8, large, 16), accept(8, 8, large);

    refuse("must not be negative", [](auto& gemm) { gemm.m = -1; });
    refuse("below 2^31", [](auto& gemm) { gemm.m = int64_t{1} << 31; });
    refuse("below 2^31", [](auto& gemm) { gemm.k = int64_t{1} << 40; });
    refuse("output", [&](auto& gemm) { gemm.m = gemm.n = gemm.d_stride = large; });
    refuse("n must be a multiple of 8", [](auto& gemm) { gemm.n = 260; });
    refuse("k must be a multiple of 16", [](auto& gemm) { gemm.k = 264; });
    refuse("a must have aligned rows", [](auto& gemm) { gemm.a = memory + 1; });
    refuse("a must have aligned rows", [](auto& gemm) { gemm.a_stride = 257; });
    refuse("b must have aligned rows", [](auto& gemm) { gemm.b = memory + 8; });
    refuse("d must have aligned rows", [](auto& gemm) { gemm.d_stride = 260; });
    refuse("d must be bfloat16 or float32", [](auto& gemm) { gemm.d_dtype = DSO_F16; });
    std::printf("%lld plans, %lld checks\n", num_plans, num_checked);
}
