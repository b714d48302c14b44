#include "launch/bf16_gemm_config.h"

#include <iterator>

namespace dso {

int choose_bf16_gemm_config(int64_t rows_per_group) {
    // Tokens choose their experts unevenly. A group of more rows than a tile has reads its weights again, from L2; one
    // of fewer costs a wider tile only a place in the ring. So a tile holds twice as many as are expected.
    const auto fits = [&](const Bf16GemmConfig& tile) { return tile.max_rows >= 2 * rows_per_group; };
    int best = 0;
    for (int config = 1; config < static_cast<int>(std::size(kBf16GemmConfigs)); ++config) {
        const Bf16GemmConfig &tile = kBf16GemmConfigs[config], &chosen = kBf16GemmConfigs[best];
        if (fits(chosen) ? fits(tile) && tile.max_rows < chosen.max_rows : tile.max_rows > chosen.max_rows)
            best = config;
    }
    return best;
}

}  // namespace dso
