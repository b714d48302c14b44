// From a checked call to a launched kernel: tensor maps, the counter of tiles, the grid.
#include <algorithm>
#include <limits>

#include "kernels/sm90_mla_prefill.cuh"
#include "launch/device_info.h"
#include "launch/launch.h"
#include "launch/mla_prefill_checks.h"
#include "launch/tensor_map.h"

namespace dso {
namespace {

/// A box is 64 channels of 128 tokens of a head.
dso_status encode_heads(const dso_prefill& prefill, const void* x, int64_t total, int64_t stride_t, int64_t stride_h,
                        int dim, TensorMap* map) {
    if (total == 0) return DSO_OK;  // then nothing is loaded by it
    return encode_tensor_map({x, prefill.num_heads, total, dim, stride_h, stride_t, 2, kPrefillTile, 64, true}, map);
}

MlaPrefillArguments arguments_of(const dso_prefill& prefill) {
    // A scale that float32 takes for 0 would make NaN of the -inf of masked scores.
    const double scale_log2 = prefill.softmax_scale * 1.4426950408889634;
    return {prefill.cu_seqlens_q,
            prefill.cu_seqlens_k,
            prefill.out,
            prefill.lse,
            static_cast<int32_t*>(prefill.workspace),
            static_cast<int>(prefill.b),
            static_cast<int>(prefill.total_q),
            static_cast<int>(prefill.total_k),
            static_cast<int>(prefill.num_heads),
            prefill.causal != 0,
            std::max(static_cast<float>(scale_log2), std::numeric_limits<float>::min())};
}

template <ptx::HalfType type>
dso_status launch(const dso_prefill& x, int device, int num_sms, dso_stream stream) {
    TensorMap map_q{}, map_k{}, map_v{};
    DSO_TRY(encode_heads(x, x.q, x.total_q, x.q_stride_t, x.q_stride_h, kPrefillKeyDim, &map_q));
    DSO_TRY(encode_heads(x, x.k, x.total_k, x.k_stride_t, x.k_stride_h, kPrefillKeyDim, &map_k));
    DSO_TRY(encode_heads(x, x.v, x.total_k, x.v_stride_t, x.v_stride_h, kPrefillValueDim, &map_v));
    const MlaPrefillArguments arguments = arguments_of(x);
    DSO_TRY(launch_kernel(mla_prefill_counter_kernel, {dim3(1), dim3(32), 0, stream, 1, true}, arguments.num_taken));
    constexpr auto kernel = sm90_mla_prefill_kernel<type>;
    constexpr int kSharedBytes = sizeof(MlaPrefillShared);
    DSO_TRY(allow_shared_memory<kernel>(device, kSharedBytes));
    const int64_t most_tiles = (x.total_q / kPrefillTile + x.b + 2) * x.num_heads;
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(num_sms, most_tiles)));
    return launch_kernel(kernel, {grid, dim3(kPrefillThreads), kSharedBytes, stream, 1, true}, map_q, map_k, map_v,
                         arguments);
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_mla_prefill(const dso_prefill* prefill, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_mla_prefill(*prefill));
    if (prefill->total_q == 0) return DSO_OK;
    if (!prefill->workspace) return fail(DSO_INVALID, "mla_prefill: no workspace");
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    return prefill->dtype == DSO_BF16 ? launch<ptx::HalfType::kBF16>(*prefill, device, num_sms, stream)
                                      : launch<ptx::HalfType::kF16>(*prefill, device, num_sms, stream);
}
