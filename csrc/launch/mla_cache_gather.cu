#include "kernels/mla_cache_gather.cuh"

#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/launch.h"
#include "launch/mla_cache_gather_checks.h"
#include "launch/row_checks.h"

namespace dso {
namespace {

constexpr int kFewRows = 8;  // of a CTA, where more would leave SMs idle

using GatherKernel = void (*)(MlaCacheGatherArguments);

template <typename Row, typename Out>
GatherKernel select_kernel(bool vectorized) {
    if constexpr (std::is_same_v<Row, Fp8Row> || std::is_same_v<Row, Fp8BlocksRow>)
        return mla_cache_gather_kernel<Row, Out, true>;
    return vectorized ? mla_cache_gather_kernel<Row, Out, true> : mla_cache_gather_kernel<Row, Out, false>;
}

template <typename Row>
GatherKernel select_kernel(dso_dtype out_dtype, bool vectorized) {
    switch (out_dtype) {
        case DSO_BF16:
            return select_kernel<Row, __nv_bfloat16>(vectorized);
        case DSO_F16:
            return select_kernel<Row, __half>(vectorized);
        default:
            return select_kernel<Row, float>(vectorized);
    }
}

GatherKernel select_kernel(const dso_latent_gather& gather, bool vectorized) {
    if (gather.format == DSO_LATENT_FP8_BLOCKS) return select_kernel<Fp8BlocksRow>(gather.out_dtype, vectorized);
    if (gather.format == DSO_LATENT_FP8) return select_kernel<Fp8Row>(gather.out_dtype, vectorized);
    switch (gather.dtype) {
        case DSO_BF16:
            return select_kernel<__nv_bfloat16>(gather.out_dtype, vectorized);
        case DSO_F16:
            return select_kernel<__half>(gather.out_dtype, vectorized);
        default:
            return select_kernel<float>(gather.out_dtype, vectorized);
    }
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_mla_cache_gather(const dso_latent_gather* gather, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_mla_cache_gather(*gather));
    if (gather->total == 0 || gather->d == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    const int element_bytes = gather->format == DSO_LATENT_PLAIN ? size_of(gather->dtype) : 1;
    const bool vectorized = gather->d % kChunk == 0 && reinterpret_cast<uintptr_t>(gather->out) % 16 == 0 &&
                            rows_are_aligned(gather->kv_cache, gather->dtype, gather->page_stride, gather->row_stride);
    const bool many = gather->total >= int64_t{8} * kGatherMaxRows * num_sms;
    const MlaCacheGatherArguments arguments{static_cast<const uint8_t*>(gather->kv_cache),
                                            gather->block_table,
                                            gather->cu_seqlens,
                                            gather->out,
                                            gather->b,
                                            gather->total,
                                            gather->max_pages,
                                            gather->num_pages,
                                            gather->page_size,
                                            gather->page_stride * element_bytes,
                                            gather->row_stride * element_bytes,
                                            gather->table_stride,
                                            static_cast<int>(gather->d),
                                            many ? kGatherMaxRows : kFewRows,
                                            gather->kv_scale};
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(gather->total, arguments.rows_of_cta)));
    return launch_kernel(select_kernel(*gather, vectorized), {grid, dim3(kGatherThreads), 0, stream, 1, true},
                         arguments);
}
