#include "launch/moe_permute_checks.h"

#include "launch/row_checks.h"
#include "launch/status.h"

namespace dso {

dso_status check_moe_permute(const dso_row_gather& gather) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "moe_permute: %s", what); };
    constexpr int64_t kMany = int64_t{1} << 31;
    if (!are_extents(gather.num_rows, gather.t, gather.d, int64_t{1} << 26) || gather.num_rows >= kMany)
        return wrong("extents must not be negative, with fewer than 2^31 rows of fewer than 2^26 elements");
    const int64_t size = gather.element_bytes;
    if (size != 1 && size != 2 && size != 4 && size != 8 && size != 16)
        return wrong("elements must have 1, 2, 4, 8 or 16 bytes");
    return DSO_OK;
}

}  // namespace dso
