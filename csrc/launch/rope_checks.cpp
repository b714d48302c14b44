#include "launch/rope_checks.h"

#include "launch/row_checks.h"
#include "launch/status.h"

namespace dso {

dso_status check_rope(const dso_rotation& rotation) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "rope: %s", what); };
    if (!are_extents(rotation.t, rotation.num_heads, rotation.d, int64_t{1} << 30))
        return wrong("extents must not be negative, and d must be below 2^30");
    if (rotation.d < 2 || rotation.d % 2 != 0) return wrong("d must be positive and even");
    if (rotation.max_position < 1) return wrong("max_position must be at least 1");
    if (rotation.t >= int64_t{1} << 31) return wrong("2^31 tokens or more");
    if (!is_high_precision(rotation.dtype)) return wrong("x must be bfloat16, float16 or float32");
    return DSO_OK;
}

}  // namespace dso
