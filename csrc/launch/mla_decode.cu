// From a checked call to a launched kernel: plan, tensor map, scratch.
#include <algorithm>
#include <cmath>

#include "kernels/sm90_mla_decode.cuh"
#include "kernels/sm90_mla_decode_few_rows.cuh"
#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/launch.h"
#include "launch/mla_decode_checks.h"
#include "launch/mla_decode_plan.h"
#include "launch/tensor_map.h"

namespace dso {

static_assert(kMlaTileRows == kMlaManyRowsTile && kMlaFewRows == kMlaFewRowsTile);

namespace {

constexpr int64_t kMostInt = (int64_t{1} << 31) - 1;
constexpr int64_t kMostKeys = kMostInt / kMlaTile * kMlaTile;

int64_t key_bytes(dso_latent_format format) {
    switch (format) {
        case DSO_LATENT_FP8_BLOCKS:
            return kFp8RowBytes;
        case DSO_LATENT_FP8:
            return kMlaKeyDim;
        default:
            return 2 * kMlaKeyDim;
    }
}

MlaDecodeShape shape_of(const dso_mla_decode& decode) {
    const bool fits = decode.max_pages <= kMostKeys / decode.page_size;
    return {decode.b,
            decode.s_q,
            decode.num_heads,
            decode.cu_seqlens_q != nullptr,
            fits ? decode.max_pages * decode.page_size : kMostKeys,
            key_bytes(decode.format)};
}

/// What several parts need: their sums, their logarithms, and one counter for each CTA of a cluster.
struct MlaDecodeScratch {
    int64_t sum_bytes = 0, lse_bytes = 0, counter_bytes = 0;

    MlaDecodeScratch(const MlaDecodeShape& shape, const dso_mla_decode_plan& plan) {
        if (plan.num_parts == 1) return;
        const int64_t num_units = shape.max_units(plan.tile_rows), num_ctas = num_units * plan.cluster_size;
        sum_bytes = num_units * plan.num_parts * num_partial_sums(plan.tile_rows) * int64_t{sizeof(float4)};
        lse_bytes = num_ctas * plan.tile_rows * plan.num_parts * int64_t{sizeof(float)};
        counter_bytes = num_ctas * int64_t{sizeof(unsigned long long)};
    }

    int64_t num_bytes() const { return sum_bytes + lse_bytes + counter_bytes; }
};

bool is_possible(const dso_mla_decode_plan& plan) {
    const int size = plan.cluster_size;
    return (size == 1 || size == 2 || size == 4 || size == 8) && plan.num_parts >= 1 &&
           plan.num_parts <= kMlaMaxParts && plan.tiles_per_part >= 0 &&
           (plan.tile_rows == kMlaManyRowsTile || plan.tile_rows == kMlaFewRowsTile);
}

/// Rows that TMA loads at a time: a tile's, or those of a smaller page where a few make up a tile; of an FP8 cache a
/// loading warp's; 0 where none do.
int box_rows_of(const dso_mla_decode& decode) {
    if (decode.num_pages == 0) return 0;
    if (decode.format != DSO_LATENT_PLAIN) return decode.page_size % kMlaQuarter == 0 ? kMlaQuarter : 0;
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
            static_cast<int>(shape.max_keys),
            static_cast<int>(decode.b),
            static_cast<int>(decode.s_q),
            static_cast<int>(decode.page_size),
            static_cast<int>(decode.num_heads),
            static_cast<int>(shape.is_ragged ? shape.max_units(plan.tile_rows) : shape.num_row_tiles(plan.tile_rows)),
            plan.num_parts,
            plan.tiles_per_part,
            box_rows_of(decode),
            decode.causal != 0,
            static_cast<float>(decode.softmax_scale * kv_scale * 1.4426950408889634),
            kv_scale};
}

template <typename Types>
dso_status launch_many_rows(const dso_mla_decode& decode, const MlaDecodeArguments& arguments, LaunchShape shape,
                            int device) {
    TensorMap map_kv{};
    if (arguments.box_rows != 0)
        DSO_TRY(encode_tensor_map(
            {decode.kv_cache, decode.num_pages, decode.page_size, Types::kIsFp8 ? key_bytes(decode.format) : kMlaKeyDim,
             decode.page_stride, decode.key_stride, Types::kIsFp8 ? 1 : 2, arguments.box_rows,
             Types::kIsFp8 ? kSwizzleBytes : 64, !Types::kIsFp8},
            &map_kv));
    constexpr auto kernel = sm90_mla_decode_kernel<Types>;
    shape.threads = dim3(kMlaThreads);
    shape.shared_bytes = sizeof(MlaDecodeShared<Types>);
    DSO_TRY(allow_shared_memory<kernel>(device, shape.shared_bytes));
    return launch_kernel(kernel, shape, map_kv, arguments);
}

/// Lines of 64 channels lie beside each other in shared memory, each under the 128-byte swizzle.
dso_status encode_keys(const dso_mla_decode& decode, int num_keys, TensorMap* map) {
    constexpr int kBytes = 2, kLine = 64;
    return encode_tensor({decode.kv_cache,
                          4,
                          {kLine, kMlaKeyDim / kLine, decode.page_size, decode.num_pages},
                          {0, kLine * kBytes, decode.key_stride * kBytes, decode.page_stride * kBytes},
                          kBytes,
                          {kLine, kMlaKeyDim / kLine, num_keys, 1},
                          true,
                          256},
                         map);
}

template <typename Types>
dso_status launch_few_rows(const dso_mla_decode& decode, const MlaDecodeArguments& arguments, LaunchShape shape,
                           int device) {
    MlaFewRowsMaps<Types::kFormat> maps{};
    if constexpr (!Types::kIsFp8) {
        if (decode.num_pages > 0) {
            DSO_TRY(encode_keys(decode, kMlaQuarter, &maps.quarter));
            DSO_TRY(encode_keys(decode, 1, &maps.key));
        }
    }
    constexpr auto kernel = sm90_mla_decode_few_rows_kernel<Types>;
    shape.threads = dim3(kMlaFewRowsThreads);
    shape.shared_bytes = sizeof(MlaFewRowsShared<Types>);
    DSO_TRY(allow_shared_memory<kernel>(device, shape.shared_bytes));
    return launch_kernel(kernel, shape, maps, arguments);
}

template <ptx::HalfType query, LatentFormat format>
dso_status launch(const dso_mla_decode& decode, const dso_mla_decode_plan& plan, int device, dso_stream stream) {
    const MlaDecodeShape shape = shape_of(decode);
    const MlaDecodeScratch scratch(shape, plan);
    const int64_t num_ctas = shape.max_units(plan.tile_rows) * plan.cluster_size;  // of one part
    if (num_ctas > kMostInt) return fail(DSO_INVALID, "mla_decode: more than 2^31 tiles of rows");
    if (scratch.num_bytes() > 0 && !decode.workspace) return fail(DSO_INVALID, "mla_decode: no workspace");
    const MlaDecodeArguments arguments = arguments_of(decode, shape, plan);
    const LaunchShape launch_shape{dim3(static_cast<unsigned>(num_ctas), static_cast<unsigned>(plan.num_parts)),
                                   dim3(),
                                   0,
                                   stream,
                                   plan.cluster_size,
                                   true};
    if (plan.tile_rows == kMlaFewRowsTile)
        return launch_few_rows<MlaFewRowsTypes<query, format>>(decode, arguments, launch_shape, device);
    return launch_many_rows<MlaDecodeTypes<query, format>>(decode, arguments, launch_shape, device);
}

template <ptx::HalfType query>
dso_status launch_for_cache(const dso_mla_decode& decode, const dso_mla_decode_plan& plan, int device,
                            dso_stream stream) {
    switch (decode.format) {
        case DSO_LATENT_FP8_BLOCKS:
            return launch<query, LatentFormat::kFp8Blocks>(decode, plan, device, stream);
        case DSO_LATENT_FP8:
            return launch<query, LatentFormat::kFp8>(decode, plan, device, stream);
        default:
            return launch<query, LatentFormat::kPlain>(decode, plan, device, stream);
    }
}

bool is_empty(const dso_mla_decode& decode) {
    return decode.s_q == 0 || (decode.b == 0 && decode.cu_seqlens_q == nullptr);
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_plan_mla_decode(const dso_mla_decode* decode, dso_mla_decode_plan* plan) {
    using namespace dso;
    DSO_TRY(check_mla_decode(*decode));
    *plan = {1, 1, 0, kMlaManyRowsTile, 0};
    if (is_empty(*decode)) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    const MlaDecodeShape shape = shape_of(*decode);
    const MlaDecodePlan chosen =
        decode->batch_invariant ? plan_batch_invariant_mla_decode(shape) : plan_mla_decode(shape, num_sms);
    *plan = {chosen.cluster_size, chosen.num_parts, chosen.tiles_per_part, chosen.tile_rows, 0};
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
