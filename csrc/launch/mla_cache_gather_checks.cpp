#include "launch/mla_cache_gather_checks.h"

#include "device/fp8_row.h"
#include "launch/row_checks.h"
#include "launch/status.h"

namespace dso {

dso_status check_mla_cache_gather(const dso_latent_gather& gather) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "mla_cache_gather: %s", what); };
    constexpr int64_t kMany = int64_t{1} << 31;
    if (gather.b < 0 || gather.max_pages < 0 || gather.num_pages < 0) return wrong("extents must not be negative");
    if (gather.page_size < 1) return wrong("page_size must be at least 1");
    if (gather.total < 0 || gather.total >= kMany) return wrong("total must be 0 to 2^31 - 1");
    if (gather.d < 0 || gather.d >= int64_t{1} << 26) return wrong("d must be 0 to 2^26 - 1");
    if (!is_high_precision(gather.out_dtype)) return wrong("out must be bfloat16, float16 or float32");
    if (gather.format == DSO_LATENT_PLAIN)
        return is_high_precision(gather.dtype) ? DSO_OK : wrong("kv_cache must be bfloat16, float16 or float32");
    if (gather.d != kFp8RowChannels) return wrong("d must be 576 with the FP8 formats");
    if (gather.format == DSO_LATENT_FP8 && !is_kv_scale(gather.kv_scale))
        return wrong("kv_scale must be from 1e-30 to 1e30");
    if (reinterpret_cast<uintptr_t>(gather.kv_cache) % 16 != 0 || gather.page_stride % 16 != 0 ||
        gather.row_stride % 16 != 0)
        return wrong("rows of the FP8 formats must be aligned to 16 bytes");
    return DSO_OK;
}

}  // namespace dso
