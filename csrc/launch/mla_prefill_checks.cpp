#include "launch/mla_prefill_checks.h"

#include <cmath>

#include "launch/status.h"

namespace dso {

dso_status check_mla_prefill(const dso_prefill& prefill) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "mla_prefill: %s", what); };
    const auto rows_are_aligned = [](const void* x, int64_t stride_t, int64_t stride_h) {
        return reinterpret_cast<uintptr_t>(x) % 16 == 0 && stride_t % 8 == 0 && stride_h % 8 == 0;
    };
    constexpr int64_t kMostRows = (int64_t{1} << 31) - 256;  // a tile of 128 rows begins below 2^31
    if (prefill.dtype != DSO_BF16 && prefill.dtype != DSO_F16) return wrong("bfloat16 or float16");
    if (prefill.b < 0 || prefill.total_q < 0 || prefill.total_k < 0 || prefill.num_heads < 1)
        return wrong("extents must not be negative, and there must be a head");
    if (prefill.b > kMostRows || prefill.total_q > kMostRows || prefill.total_k > kMostRows)
        return wrong("more than 2^31 rows or sequences");
    // Each sequence may leave a tile unfilled, and so may the rows before the first and after the last.
    const int64_t most_tiles = prefill.total_q / 128 + prefill.b + 2;
    if (prefill.num_heads > (int64_t{1} << 30) / most_tiles) return wrong("more than 2^30 tiles of queries");
    if (!rows_are_aligned(prefill.q, prefill.q_stride_t, prefill.q_stride_h) ||
        !rows_are_aligned(prefill.k, prefill.k_stride_t, prefill.k_stride_h) ||
        !rows_are_aligned(prefill.v, prefill.v_stride_t, prefill.v_stride_h) || !rows_are_aligned(prefill.out, 0, 0))
        return wrong("rows must start at multiples of 16 bytes");
    if (!(prefill.softmax_scale > 0) || !std::isfinite(prefill.softmax_scale))
        return wrong("softmax_scale must be positive and finite");
    return DSO_OK;
}

}  // namespace dso
