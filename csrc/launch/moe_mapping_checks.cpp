#include "launch/moe_mapping_checks.h"

#include "launch/status.h"

namespace dso {

dso_status check_moe_mapping(const dso_expert_rows& rows) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "moe_mapping: %s", what); };
    constexpr int64_t kMany = int64_t{1} << 31;
    if (rows.num_experts < 1 || rows.num_experts > kMaxMappedExperts) return wrong("num_experts must be 1 to 4096");
    if (rows.alignment < 1) return wrong("alignment must be at least 1");
    if (rows.t < 0 || rows.num_topk < 0 || rows.num_topk >= kMany ||
        rows.t > (kMany - 1) / std::max<int64_t>(rows.num_topk, 1))
        return wrong("extents must not be negative, with fewer than 2^31 pairs");
    const int64_t num_pairs = rows.t * rows.num_topk;
    if (num_pairs > 0 && rows.alignment >= kMany) return wrong("2^31 rows or more");
    const int64_t num_rows = num_mapped_rows(num_pairs, rows.num_experts, rows.alignment);
    if (num_rows >= kMany) return wrong("2^31 rows or more");
    if (rows.num_rows != num_rows) return wrong("num_rows must be the most that the pairs can need");
    return DSO_OK;
}

}  // namespace dso
