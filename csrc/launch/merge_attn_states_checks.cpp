#include "launch/merge_attn_states_checks.h"

#include "launch/row_checks.h"
#include "launch/status.h"

namespace dso {

dso_status check_merge_attn_states(const dso_attn_states& states) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "merge_attn_states: %s", what); };
    if (!are_extents(states.num_groups, states.m, states.d, int64_t{1} << 30))
        return wrong("extents must not be negative, and d must be below 2^30");
    if (!is_high_precision(states.dtype)) return wrong("out_a must be bfloat16, float16 or float32");
    return DSO_OK;
}

}  // namespace dso
