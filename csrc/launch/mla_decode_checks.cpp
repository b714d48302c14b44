#include "launch/mla_decode_checks.h"

#include <cmath>

#include "launch/row_checks.h"
#include "launch/status.h"

namespace dso {

dso_status check_mla_decode(const dso_mla_decode& decode) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "mla_decode: %s", what); };
    const auto rows_are_aligned = [](const void* x, int64_t stride_0, int64_t stride_1, int64_t stride_2,
                                     int64_t elements = 8) {  // of 16 bytes
        return reinterpret_cast<uintptr_t>(x) % 16 == 0 && stride_0 % elements == 0 && stride_1 % elements == 0 &&
               stride_2 % elements == 0;
    };
    constexpr int64_t kMost = (int64_t{1} << 31) - 1;
    if (decode.dtype != DSO_BF16 && decode.dtype != DSO_F16) return wrong("bfloat16 or float16");
    if (decode.b < 0 || decode.s_q < 0 || decode.num_heads < 1 || decode.num_pages < 0 || decode.page_size < 1 ||
        decode.max_pages < 0)
        return wrong("extents must not be negative, and there must be a head and a row of a page");
    if (decode.page_size > kMost || decode.b > kMost || decode.num_heads > kMost ||
        decode.s_q > kMost / decode.num_heads)
        return wrong("more than 2^31 requests, rows of a request, or of a page");
    if (!rows_are_aligned(decode.q, decode.q_stride_b, decode.q_stride_s, decode.q_stride_h) ||
        !rows_are_aligned(decode.out, decode.out_stride_b, decode.out_stride_s, decode.out_stride_h) ||
        !rows_are_aligned(decode.kv_cache, decode.page_stride, decode.key_stride, 0,
                          decode.format == DSO_LATENT_PLAIN ? 8 : 16))
        return wrong("rows must start at multiples of 16 bytes");
    if (!(decode.softmax_scale > 0) || !std::isfinite(decode.softmax_scale))
        return wrong("softmax_scale must be positive and finite");
    if (decode.format == DSO_LATENT_FP8 && !is_kv_scale(decode.kv_scale))
        return wrong("kv_scale must be from 1e-30 to 1e30");
    return DSO_OK;
}

}  // namespace dso
