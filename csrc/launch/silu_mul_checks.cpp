#include "launch/silu_mul_checks.h"

#include "launch/fp8_quantize_checks.h"
#include "launch/row_checks.h"
#include "launch/status.h"

namespace dso {

dso_status check_silu_mul(const dso_swiglu& silu_mul) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "silu_mul: %s", what); };
    if (!are_extents(silu_mul.num_groups, silu_mul.m, silu_mul.d, int64_t{1} << 30))
        return wrong("extents must not be negative, and d must be below 2^30");
    if (!is_high_precision(silu_mul.x_dtype)) return wrong("x must be bfloat16, float16 or float32");
    const bool is_empty = silu_mul.num_groups == 0 || silu_mul.m == 0 || silu_mul.d == 0;
    if (!is_empty && !silu_mul.y == !silu_mul.q) return wrong("either y or q");
    if (silu_mul.q && !(silu_mul.amax_floor >= kSmallestAmaxFloor)) return wrong("amax_floor must be at least 1e-30");
    return DSO_OK;
}

}  // namespace dso
