#include "launch/fp8_quantize_checks.h"

#include "launch/row_checks.h"
#include "launch/status.h"

namespace dso {
namespace {

dso_status check_cast(const char* op, int64_t num_groups, int64_t m, int64_t k, dso_dtype dtype, float amax_floor) {
    const auto wrong = [op](const char* what) { return fail(DSO_INVALID, "%s: %s", op, what); };
    if (!are_extents(num_groups, m, k, INT64_MAX)) return wrong("extents must not be negative");
    if (k >= (int64_t{1} << 31)) return wrong("k must be below 2^31");
    if (!(amax_floor >= kSmallestAmaxFloor)) return wrong("amax_floor must be at least 1e-30");
    if (!is_high_precision(dtype)) return wrong("x must be bfloat16, float16 or float32");
    return DSO_OK;
}

}  // namespace

dso_status check_per_token_cast(const dso_per_token_cast& cast) {
    return check_cast("per_token_cast_to_fp8", cast.num_groups, cast.m, cast.k, cast.x_dtype, cast.amax_floor);
}

dso_status check_per_block_cast(const dso_per_block_cast& cast) {
    return check_cast("per_block_cast_to_fp8", cast.num_groups, cast.n, cast.k, cast.x_dtype, cast.amax_floor);
}

}  // namespace dso
