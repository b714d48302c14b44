#include "launch/moe_unpermute_checks.h"

#include "launch/row_checks.h"
#include "launch/status.h"

namespace dso {

dso_status check_moe_unpermute(const dso_row_sum& sum) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "moe_unpermute: %s", what); };
    constexpr int64_t kMany = int64_t{1} << 31;
    if (!are_extents(sum.num_rows, sum.t, sum.d, int64_t{1} << 27) || sum.t >= kMany)
        return wrong("extents must not be negative, d below 2^27 and t below 2^31");
    if (sum.num_topk < 0 || sum.num_topk >= kMany) return wrong("num_topk must be 0 to 2^31 - 1");
    if (!is_high_precision(sum.dtype)) return wrong("y must be bfloat16, float16 or float32");
    return DSO_OK;
}

}  // namespace dso
