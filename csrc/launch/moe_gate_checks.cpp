#include "launch/moe_gate_checks.h"

#include "launch/status.h"

namespace dso {

dso_status check_moe_gate(const dso_gate& gate) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "moe_gate: %s", what); };
    constexpr int64_t kMaxWords = 48 * 1024 / 4;  // of shared memory, without asking for more
    if (gate.t < 0 || gate.t >= int64_t{1} << 31) return wrong("t must be 0 to 2^31 - 1");
    if (gate.num_experts < 1 || gate.num_experts > kMaxWords) return wrong("num_experts must be 1 to 12288");
    if (gate.num_groups < 1 || gate.num_experts % gate.num_groups != 0)
        return wrong("num_groups must be a divisor of num_experts");
    if (gate.num_topk_groups < 1 || gate.num_topk_groups > gate.num_groups)
        return wrong("num_topk_groups must be 1 to num_groups");
    const int64_t num_kept = gate.num_experts / gate.num_groups * gate.num_topk_groups;
    if (gate.num_topk < 1 || gate.num_topk > num_kept)
        return wrong("num_topk must be 1 to the number of experts of the kept groups");
    if (gate.num_experts + 2 * gate.num_groups + gate.num_topk > kMaxWords)
        return wrong("experts, twice the groups, and num_topk must be at most 12288 together");
    return DSO_OK;
}

}  // namespace dso
