// From a checked call to a launched kernel: plan, tensor map, scratch.
#include <algorithm>
#include <cmath>

#include "kernels/sm90_mla_decode.cuh"
#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/launch.h"
#include "launch/mla_decode_checks.h"
#include "launch/mla_decode_plan.h"
#include "launch/tensor_map.h"

namespace dso {
namespace {

constexpr int64_t kMostInt = (int64_t{1} << 31) - 1;
constexpr int64_t kMostKeys = kMostInt / kMlaTile * kMlaTile;

/// Extents that follow from a call's.
struct MlaDecodeShape {
    int64_t num_rows, num_row_tiles;  // of a request; of ragged queries, on average
    int64_t num_units;                // tiles of rows of all; of ragged queries, as many as there can be
    int64_t max_keys;

    explicit MlaDecodeShape(const dso_mla_decode& decode)
        : max_keys(decode.max_pages > kMostKeys / decode.page_size ? kMostKeys : decode.max_pages * decode.page_size) {
        const bool is_ragged = decode.cu_seqlens_q != nullptr;
        const int64_t s_q = is_ragged ? ceil_div(decode.s_q, std::max<int64_t>(decode.b, 1)) : decode.s_q;
        num_rows = s_q * decode.num_heads;
        num_row_tiles = ceil_div<int64_t>(num_rows, kMlaTile);
        // Ragged, each request, and the rows before and after those of all, may begin a tile that it does not fill.
        num_units = is_ragged ? ceil_div<int64_t>(decode.s_q * decode.num_heads, kMlaTile) + decode.b + 1
                              : decode.b * num_row_tiles;
    }
};

/// What several parts need: their sums, their logarithms, and one counter for each CTA of a cluster.
struct MlaDecodeScratch {
    int64_t sum_bytes = 0, lse_bytes = 0, counter_bytes = 0;

    MlaDecodeScratch(const MlaDecodeShape& shape, const dso_mla_decode_plan& plan) {
        if (plan.num_parts == 1) return;
        const int64_t num_ctas = shape.num_units * plan.cluster_size;  // of one part
        sum_bytes = shape.num_units * plan.num_parts * kMlaPartialSums * int64_t{sizeof(float4)};
        lse_bytes = num_ctas * kMlaTile * plan.num_parts * int64_t{sizeof(float)};
        counter_bytes = num_ctas * int64_t{sizeof(unsigned long long)};
    }

    int64_t num_bytes() const { return sum_bytes + lse_bytes + counter_bytes; }
};

bool is_possible(const dso_mla_decode_plan& plan) {
    const int size = plan.cluster_size;
    return (size == 1 || size == 2 || size == 4 || size == 8) && plan.num_parts >= 1 &&
           plan.num_parts <= kMlaMaxParts && plan.tiles_per_part >= 0;
}

/// Rows that TMA loads at a time: a tile's, or those of a smaller page where a few make up a tile; 0 where none do.
int box_rows_of(const dso_mla_decode& decode) {
    if (decode.num_pages == 0 || decode.format != DSO_LATENT_PLAIN) return 0;
    if (decode.page_size % kMlaTile == 0) return kMlaTile;
    return kMlaTile % decode.page_size == 0 && decode.page_size >= 8 ? static_cast<int>(decode.page_size) : 0;
}

MlaDecodeArguments arguments_of(const dso_mla_decode& decode, const MlaDecodeShape& shape,
                                const dso_mla_decode_plan& plan) {
    const float kv_scale = decode.format == DSO_LATENT_FP8 ? decode.kv_scale : 1.f;
    const MlaDecodeScratch scratch(shape, plan);
    auto* workspace = static_cast<uint8_t*>(decode.workspace);
    return {decode.q,
            decode.q_stride_b,
            decode.q_stride_s,
            decode.q_stride_h,
            decode.kv_cache,
            decode.page_stride,
            decode.key_stride,
            decode.block_table,
            decode.table_stride,
            decode.cache_seqlens,
            decode.cu_seqlens_q,
            decode.out,
            decode.out_stride_b,
            decode.out_stride_s,
            decode.out_stride_h,
            decode.lse,
            reinterpret_cast<float4*>(workspace),
            reinterpret_cast<float*>(workspace + scratch.sum_bytes),
            reinterpret_cast<unsigned long long*>(workspace + scratch.sum_bytes + scratch.lse_bytes),
            static_cast<int>(std::min(decode.num_pages, kMostInt)),
            static_cast<int>(decode.page_size),
            static_cast<int>(shape.max_keys),
            static_cast<int>(decode.b),
            static_cast<int>(decode.s_q),
            static_cast<int>(decode.num_heads),
            static_cast<int>(shape.num_row_tiles),
            plan.num_parts,
            plan.tiles_per_part,
            box_rows_of(decode),
            decode.causal != 0,
            static_cast<float>(decode.softmax_scale * kv_scale * 1.4426950408889634),
            kv_scale};
}

template <typename Types>
dso_status launch(const dso_mla_decode& decode, const dso_mla_decode_plan& plan, int device, dso_stream stream) {
    const MlaDecodeShape shape(decode);
    const MlaDecodeScratch scratch(shape, plan);
    const int64_t num_ctas = shape.num_units * plan.cluster_size;  // of one part
    if (num_ctas > kMostInt) return fail(DSO_INVALID, "mla_decode: more than 2^31 tiles of rows");
    if (scratch.num_bytes() > 0 && !decode.workspace) return fail(DSO_INVALID, "mla_decode: no workspace");
    const MlaDecodeArguments arguments = arguments_of(decode, shape, plan);
    TensorMap map_kv{};
    if (arguments.box_rows != 0)
        DSO_TRY(encode_tensor_map({decode.kv_cache, decode.num_pages, decode.page_size, kMlaKeyDim, decode.page_stride,
                                   decode.key_stride, 2, arguments.box_rows, 64, true},
                                  &map_kv));
    constexpr auto kernel = sm90_mla_decode_kernel<Types>;
    constexpr int kSharedBytes = sizeof(MlaDecodeShared<Types>);
    DSO_TRY(allow_shared_memory<kernel>(device, kSharedBytes));
    return launch_kernel(kernel,
                         {dim3(static_cast<unsigned>(num_ctas), static_cast<unsigned>(plan.num_parts)),
                          dim3(kMlaThreads), kSharedBytes, stream, plan.cluster_size, true},
                         map_kv, arguments);
}

template <ptx::HalfType query>
dso_status launch_for_cache(const dso_mla_decode& decode, const dso_mla_decode_plan& plan, int device,
                            dso_stream stream) {
    switch (decode.format) {
        case DSO_LATENT_FP8_BLOCKS:
            return launch<MlaDecodeTypes<query, LatentFormat::kFp8Blocks>>(decode, plan, device, stream);
        case DSO_LATENT_FP8:
            return launch<MlaDecodeTypes<query, LatentFormat::kFp8>>(decode, plan, device, stream);
        default:
            return launch<MlaDecodeTypes<query, LatentFormat::kPlain>>(decode, plan, device, stream);
    }
}

bool is_empty(const dso_mla_decode& decode) {
    return decode.s_q == 0 || (decode.b == 0 && decode.cu_seqlens_q == nullptr);
}

int64_t row_bytes(dso_latent_format format) {
    switch (format) {
        case DSO_LATENT_FP8_BLOCKS:
            return kFp8RowBytes;
        case DSO_LATENT_FP8:
            return kMlaKeyDim;
        default:
            return 2 * kMlaKeyDim;
    }
}

MlaDecodeSplits splits_of(const dso_mla_decode& decode, const MlaDecodeShape& shape, int num_sms) {
    if (decode.batch_invariant) return plan_batch_invariant_mla_decode(shape.max_keys);
    return plan_mla_decode(shape.num_units, shape.num_row_tiles, std::min<int64_t>(shape.num_rows, kMlaTile),
                           shape.max_keys, row_bytes(decode.format), num_sms);
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_plan_mla_decode(const dso_mla_decode* decode, dso_mla_decode_plan* plan) {
    using namespace dso;
    DSO_TRY(check_mla_decode(*decode));
    *plan = {1, 1, 0, 0};
    if (is_empty(*decode)) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    const MlaDecodeShape shape(*decode);
    const MlaDecodeSplits splits = splits_of(*decode, shape, num_sms);
    *plan = {splits.cluster_size, splits.num_parts, splits.tiles_per_part, 0};
    plan->workspace_bytes = MlaDecodeScratch(shape, *plan).num_bytes();
    return DSO_OK;
}

extern "C" dso_status dso_mla_decode_by_plan(const dso_mla_decode* decode, const dso_mla_decode_plan* plan,
                                             dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_mla_decode(*decode));
    if (!is_possible(*plan)) return fail(DSO_INVALID, "mla_decode: no such plan");
    if (is_empty(*decode)) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    return decode->dtype == DSO_BF16 ? launch_for_cache<ptx::HalfType::kBF16>(*decode, *plan, device, stream)
                                     : launch_for_cache<ptx::HalfType::kF16>(*decode, *plan, device, stream);
}
