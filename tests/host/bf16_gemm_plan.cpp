// The grouped bfloat16 GEMM's host side: what is refused, every limit of the compiled tiles, and which one is chosen.
#include <cstring>
#include <initializer_list>

#include "expect.h"
#include "launch/bf16_gemm_checks.h"
#include "launch/bf16_gemm_config.h"

namespace {

constexpr int kSharedLimit = 232448;  // bytes that one CTA can have on sm_90
constexpr int kMostRows = 64;         // that the widest tile has

alignas(128) unsigned char memory[128];

dso_m_grouped_bf16_gemm gemm_of(int64_t num_groups, int64_t m, int64_t n, int64_t k) {
    dso_m_grouped_bf16_gemm gemm{};
    gemm.a = gemm.b = gemm.d = memory;
    gemm.num_groups = num_groups, gemm.m = m, gemm.n = n, gemm.k = k;
    gemm.a_stride = gemm.b_stride = k, gemm.d_stride = n, gemm.b_stride_group = n * k;
    return gemm;
}

void accept(const dso_m_grouped_bf16_gemm& gemm) {
    EXPECT(dso::check_m_grouped_bf16_gemm(gemm) == DSO_OK, "refused: %s", dso_last_error());
}

template <typename Change>
void refuse(const char* words, Change change) {
    dso_m_grouped_bf16_gemm gemm = gemm_of(4, 256, 256, 256);
    change(gemm);
    EXPECT(dso::check_m_grouped_bf16_gemm(gemm) == DSO_INVALID, "accepted: %s", words);
    EXPECT(strstr(dso_last_error(), words), "\"%s\" does not say \"%s\"", dso_last_error(), words);
}

void check_tiles() {
    for (const dso::Bf16GemmConfig& tile : dso::kBf16GemmConfigs) {
        EXPECT(tile.shared_bytes() <= kSharedLimit, "%d bytes", tile.shared_bytes());
        const int stage = (tile.max_rows + tile.block_n) * 128;
        EXPECT(tile.shared_bytes() + stage > kSharedLimit, "room for one more than %d stages", tile.num_stages);
    }
}

/// The narrowest tile that holds twice the rows that are expected; the widest, where none does.
void check_choice(int64_t rows_per_group) {
    const int chosen = dso::choose_bf16_gemm_config(rows_per_group);
    const int max_rows = dso::kBf16GemmConfigs[chosen].max_rows;
    EXPECT(max_rows >= 2 * rows_per_group || max_rows == kMostRows, "%d rows", max_rows);
    for (const dso::Bf16GemmConfig& tile : dso::kBf16GemmConfigs)
        EXPECT(tile.max_rows >= max_rows || tile.max_rows < 2 * rows_per_group, "%d rows are enough", tile.max_rows);
}

}  // namespace

int main() {
    check_tiles();
    for (int64_t rows = 0; rows < 2000; ++rows) check_choice(rows);
    check_choice(int64_t{1} << 31);

    const int64_t large = (int64_t{1} << 31) - 1024;
    for (const int64_t extent : {int64_t{0}, int64_t{8}, large}) {
        accept(gemm_of(extent, 8, 8, 8)), accept(gemm_of(8, extent, 8, 8));
        accept(gemm_of(8, 8, extent, 8)), accept(gemm_of(8, 8, 8, extent));
    }
    refuse("negative", [](auto& gemm) { gemm.m = -1; });
    refuse("below 2^31", [](auto& gemm) { gemm.num_groups = int64_t{1} << 31; });
    refuse("below 2^31", [](auto& gemm) { gemm.k = int64_t{1} << 40; });
    refuse("n must be a multiple of 8", [](auto& gemm) { gemm.n = 260; });
    refuse("k must be a multiple of 8", [](auto& gemm) { gemm.k = 252; });
    refuse("a must have aligned rows", [](auto& gemm) { gemm.a = memory + 8; });
    refuse("a must have aligned rows", [](auto& gemm) { gemm.a_stride = 260; });
    refuse("a must have aligned rows", [](auto& gemm) { gemm.a_stride = 248; });
    refuse("b must have aligned rows", [](auto& gemm) { gemm.b = memory + 1; });
    refuse("b must have aligned rows", [](auto& gemm) { gemm.b_stride = 257; });
    refuse("b must have aligned matrices", [](auto& gemm) { gemm.b_stride_group += 4; });
    refuse("d must have aligned rows", [](auto& gemm) { gemm.d_stride = 260; });
    std::printf("%lld checks\n", num_checked);
}
