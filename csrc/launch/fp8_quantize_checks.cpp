#include "launch/fp8_quantize_checks.h"

#include "launch/status.h"

namespace dso {

dso_status check_per_token_cast(const dso_per_token_cast& cast) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "per_token_cast_to_fp8: %s", what); };
    if (cast.num_groups < 0 || cast.m < 0 || cast.k < 0) return wrong("extents must not be negative");
    if (cast.k >= (int64_t{1} << 31)) return wrong("k must be below 2^31");
    if (!(cast.amax_floor >= 1e-30f)) return wrong("amax_floor must be at least 1e-30");
    if (cast.x_dtype != DSO_BF16 && cast.x_dtype != DSO_F16 && cast.x_dtype != DSO_F32)
        return wrong("x must be bfloat16, float16 or float32");
    return DSO_OK;
}

}  // namespace dso
