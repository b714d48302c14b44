#include "launch/rms_norm_checks.h"

#include <cmath>

#include "device/math.cuh"
#include "launch/fp8_quantize_checks.h"
#include "launch/row_checks.h"
#include "launch/status.h"

namespace dso {

dso_status check_rms_norm(const dso_norm& norm) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "rms_norm: %s", what); };
    if (!are_extents(norm.num_groups, norm.m, norm.d, int64_t{1} << 30))
        return wrong("extents must not be negative, and d must be below 2^30");
    if (!is_high_precision(norm.x_dtype)) return wrong("x must be bfloat16, float16 or float32");
    if (norm.weight_dtype != norm.x_dtype && norm.weight_dtype != DSO_F32)
        return wrong("weight must be of the type of x, or float32");
    if (!(norm.eps > 0) || !std::isfinite(norm.eps)) return wrong("eps must be positive and finite");
    const bool is_empty = norm.num_groups == 0 || norm.m == 0 || norm.d == 0;
    if (!is_empty && !norm.y == !norm.q) return wrong("either y or q");
    if (norm.q && !(norm.amax_floor >= kSmallestAmaxFloor)) return wrong("amax_floor must be at least 1e-30");
    return DSO_OK;
}

RmsNormShape rms_norm_shape(int64_t d) {
    constexpr int64_t kChunk = 8, kWarp = 32, kMaxThreads = 512;
    const int64_t chunks = ceil_div(d, kChunk);
    // What a thread does once for its row costs as much as a dozen elements: few threads, with several chunks each.
    const int num_chunks = chunks <= kWarp ? 1 : chunks <= 512 ? 2 : 4;
    const int64_t threads = align_up(ceil_div<int64_t>(chunks, num_chunks), kWarp);
    return {static_cast<int>(threads < kMaxThreads ? threads : kMaxThreads), num_chunks, threads <= kMaxThreads};
}

}  // namespace dso
