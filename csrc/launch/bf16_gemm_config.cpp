#include "launch/bf16_gemm_config.h"

#include <iterator>

namespace dso {

int choose_bf16_gemm_config(int64_t rows_per_group) {
    // Tokens choose their experts unevenly. A group of more rows than a tile has reads its weights again, from L2; one
    // of fewer costs a wider tile only a place in the ring. So a tile holds twice as many as are expected.
    constexpr int kWidest = static_cast<int>(std::size(kBf16GemmConfigs)) - 1;
    int config = 0;
    while (config < kWidest && kBf16GemmConfigs[config].max_rows < 2 * rows_per_group) ++config;
    return config;
}

}  // namespace dso
