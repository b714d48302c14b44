#include "launch/fp8_gemm_config.h"

#include <algorithm>
#include <iterator>

#include "device/math.cuh"
#include "launch/status.h"

namespace dso {
namespace {

// Estimates, not measurements (docs/fp8_gemm.md): of the tensor core's 8,192 operations a clock, the share that one,
// two or three math warpgroups reach, promotion included; what an SM loads; and the clocks of a tile's start and end.
constexpr double kMathRate[] = {0, 0.62 * 8192, 0.73 * 8192, 0.82 * 8192};
constexpr double kLoadBytesPerClock = 48;  // from L2 into one SM while all load
constexpr double kTileClocks = 1500;

double tile_clocks(const Fp8GemmConfig& config, int64_t num_k_blocks) {
    const double operations = 2.0 * config.block_m() * config.block_n * 128;
    const double bytes = (config.block_m() + config.block_n) * 128.0;
    const double step = std::max(operations / kMathRate[config.num_math_warpgroups], bytes / kLoadBytesPerClock);
    return num_k_blocks * step + kTileClocks;
}

double estimated_clocks(const Fp8GemmConfig& config, int64_t m, int64_t n, int64_t k, int num_sms) {
    const int64_t num_tiles = ceil_div<int64_t>(m, config.block_m()) * ceil_div<int64_t>(n, config.block_n);
    return ceil_div<int64_t>(num_tiles, num_sms) * tile_clocks(config, ceil_div<int64_t>(k, 128));
}

}  // namespace

int select_fp8_gemm_config(int64_t m, int64_t n, int64_t k, int num_sms) {
    int best = 0;
    for (int i = 1; i < static_cast<int>(std::size(kFp8GemmConfigs)); ++i) {
        if (estimated_clocks(kFp8GemmConfigs[i], m, n, k, num_sms) <
            estimated_clocks(kFp8GemmConfigs[best], m, n, k, num_sms)) {
            best = i;
        }
    }
    return best;
}

}  // namespace dso

extern "C" dso_status dso_select_fp8_gemm_config(int64_t m, int64_t n, int64_t k, int num_sms,
                                                 dso_fp8_gemm_config* config) {
    if (m < 1 || n < 1 || k < 1 || num_sms < 1)
        return dso::fail(DSO_INVALID, "a config is chosen for m, n, k and num_sms of at least 1");
    const dso::Fp8GemmConfig& chosen = dso::kFp8GemmConfigs[dso::select_fp8_gemm_config(m, n, k, num_sms)];
    *config = {chosen.block_m(), chosen.block_n, chosen.num_stages, chosen.shared_bytes()};
    return DSO_OK;
}
