#include "kernels/mla_cache_write.cuh"

#include "device/math.cuh"
#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/launch.h"
#include "launch/mla_cache_write_checks.h"
#include "launch/row_checks.h"

namespace dso {
namespace {

constexpr int kTallPatch = 4;  // tokens

using WriteKernel = void (*)(MlaCacheWriteArguments);

template <typename T, typename Weight, bool kNorm, LatentFormat format>
WriteKernel select_kernel(bool vectorized, int tokens_of_a_warp) {
    if (!vectorized) return mla_cache_write_kernel<T, Weight, kNorm, format, 1, false>;
    return tokens_of_a_warp == 1 ? mla_cache_write_kernel<T, Weight, kNorm, format, 1, true>
                                 : mla_cache_write_kernel<T, Weight, kNorm, format, kTallPatch, true>;
}

template <typename T, typename Weight, bool kNorm>
WriteKernel select_kernel(dso_latent_format format, bool vectorized, int tokens_of_a_warp) {
    switch (format) {
        case DSO_LATENT_FP8_BLOCKS:
            return select_kernel<T, Weight, kNorm, LatentFormat::kFp8Blocks>(vectorized, tokens_of_a_warp);
        case DSO_LATENT_FP8:
            return select_kernel<T, Weight, kNorm, LatentFormat::kFp8>(vectorized, tokens_of_a_warp);
        default:
            return select_kernel<T, Weight, kNorm, LatentFormat::kPlain>(vectorized, tokens_of_a_warp);
    }
}

template <typename T>
WriteKernel select_kernel(const dso_latent_write& write, bool vectorized, int tokens_of_a_warp) {
    const dso_latent_format format = write.format;
    if (!write.norm_weight) return select_kernel<T, T, false>(format, vectorized, tokens_of_a_warp);
    return write.weight_dtype == DSO_F32 ? select_kernel<T, float, true>(format, vectorized, tokens_of_a_warp)
                                         : select_kernel<T, T, true>(format, vectorized, tokens_of_a_warp);
}

WriteKernel select_kernel(const dso_latent_write& write, bool vectorized, int tokens_of_a_warp) {
    switch (write.dtype) {
        case DSO_BF16:
            return select_kernel<__nv_bfloat16>(write, vectorized, tokens_of_a_warp);
        case DSO_F16:
            return select_kernel<__half>(write, vectorized, tokens_of_a_warp);
        default:
            return select_kernel<float>(write, vectorized, tokens_of_a_warp);
    }
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

/// Whether a warp holds a token at once, and takes its rows and those of the table 16 bytes at a time.
bool can_be_vectorized(const dso_latent_write& write, int element_bytes) {
    return write.kv_lora_rank % kChunk == 0 && write.kv_lora_rank <= kPatchColumns && write.rope_dim % kChunk == 0 &&
           write.rope_dim <= 32 * kChunk && rows_are_aligned(write.kv_c, write.dtype, 0, write.kv_c_stride) &&
           rows_are_aligned(write.k_pe, write.dtype, 0, write.k_pe_stride) && is_aligned(write.cos_sin) &&
           is_aligned(write.norm_weight) && is_aligned(write.kv_cache) && write.page_stride * element_bytes % 16 == 0 &&
           write.row_stride * element_bytes % 16 == 0;
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_mla_cache_write(const dso_latent_write* write, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_mla_cache_write(*write));
    if (write->num_tokens == 0 || write->num_pages == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    const int element_bytes = write->format == DSO_LATENT_PLAIN ? size_of(write->dtype) : 1;
    const MlaCacheWriteArguments arguments{write->kv_c,
                                           write->k_pe,
                                           write->cos_sin,
                                           write->norm_weight,
                                           static_cast<uint8_t*>(write->kv_cache),
                                           {write->positions, write->positions_are_64_bit != 0},
                                           {write->slots, write->slots_are_64_bit != 0},
                                           write->num_tokens,
                                           write->kv_c_stride,
                                           write->k_pe_stride,
                                           write->max_position,
                                           write->page_stride * element_bytes,
                                           write->row_stride * element_bytes,
                                           static_cast<uint32_t>(write->num_pages * write->page_size),
                                           static_cast<uint32_t>(write->page_size),
                                           static_cast<int>(write->kv_lora_rank),
                                           static_cast<int>(write->rope_dim),
                                           write->eps,
                                           1.f / static_cast<float>(write->kv_lora_rank),
                                           write->amax_floor,
                                           1.f / write->kv_scale,
                                           write->interleaved != 0};
    const bool vectorized = can_be_vectorized(*write, element_bytes);
    // Few tokens want a warp and a CTA each, so that all SMs load at once; many want less to be done for each.
    constexpr int64_t kWarps = kCacheWriteThreads / 32;
    const bool many = write->num_tokens >= 2 * kWarps * num_sms;
    const bool tall = vectorized && write->rope_dim <= 32 / kTallPatch * kChunk &&
                      write->num_tokens >= 2 * kWarps * kTallPatch * num_sms;
    const int64_t warps = ceil_div<int64_t>(write->num_tokens, tall ? kTallPatch : 1),
                  warps_of_a_cta = many ? kWarps : 1;
    const dim3 grid(static_cast<unsigned>(ceil_div(warps, warps_of_a_cta)));
    return launch_kernel(select_kernel(*write, vectorized, tall ? kTallPatch : 1),
                         {grid, dim3(32, static_cast<unsigned>(warps_of_a_cta)), 0, stream, 1, true}, arguments);
}
