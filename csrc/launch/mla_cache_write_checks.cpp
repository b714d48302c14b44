#include "launch/mla_cache_write_checks.h"

#include <cmath>

#include "launch/fp8_quantize_checks.h"
#include "launch/row_checks.h"
#include "launch/status.h"

namespace dso {

dso_status check_mla_cache_write(const dso_latent_write& write) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "mla_cache_write: %s", what); };
    constexpr int64_t kLimit = int64_t{1} << 28;
    if (write.num_tokens < 0 || write.num_pages < 0) return wrong("extents must not be negative");
    if (write.kv_lora_rank < 1 || write.kv_lora_rank >= kLimit) return wrong("kv_lora_rank must be 1 to 2^28 - 1");
    if (write.rope_dim < 2 || write.rope_dim % 2 != 0 || write.rope_dim >= kLimit)
        return wrong("rope_dim must be positive, even and below 2^28");
    if (write.page_size < 1 || write.max_position < 1) return wrong("page_size and max_position must be at least 1");
    constexpr int64_t kMany = int64_t{1} << 31;
    if (write.num_tokens >= kMany) return wrong("2^31 tokens or more");
    if (write.page_size >= kMany || write.num_pages > (kMany - 1) / write.page_size) return wrong("2^31 slots or more");
    if (!is_high_precision(write.dtype)) return wrong("kv_c must be bfloat16, float16 or float32");
    if (write.norm_weight) {
        if (write.weight_dtype != write.dtype && write.weight_dtype != DSO_F32)
            return wrong("norm_weight must be of the type of kv_c, or float32");
        if (!(write.eps > 0) || !std::isfinite(write.eps)) return wrong("eps must be positive and finite");
    }
    if (write.format == DSO_LATENT_PLAIN) return DSO_OK;
    if (write.kv_lora_rank != 512 || write.rope_dim != 64) return wrong("the FP8 formats are for 512 + 64 channels");
    if (write.format == DSO_LATENT_FP8)
        return is_kv_scale(write.kv_scale) ? DSO_OK : wrong("kv_scale must be from 1e-30 to 1e30");
    if (!(write.amax_floor >= kSmallestAmaxFloor)) return wrong("amax_floor must be at least 1e-30");
    if (reinterpret_cast<uintptr_t>(write.kv_cache) % 4 != 0 || write.page_stride % 4 != 0 || write.row_stride % 4 != 0)
        return wrong("rows of the FP8 format must be aligned to 4 bytes");
    return DSO_OK;
}

}  // namespace dso
