// A step's tokens into the paged latent cache:   cache[slot] = norm(kv_c) | rope(k_pe),   norm as rms_norm, or none
//
//   kv_c       [t, rank]            bf16, f16 or f32, rows contiguous       16-byte loads where all is aligned for them
//   k_pe       [t, rope_dim]        the same
//   cos_sin    [max_position, rope_dim]   f32, contiguous                   16-byte loads
//   positions, slots   [t]          int32 or int64
//   kv_cache   [pages, page_size]   rows of rank + rope_dim elements of kv_c's type                  16-byte stores
//              or of 512 e4m3 | 4 f32 scales | 64 bf16: 656 bytes                        8, 4 and 16-byte stores
//              or of 576 e4m3, of one scale for all                                      8-byte stores
//
// Work      A warp a token, alone in its CTA where tokens are few; four tokens a warp where they are many. The latents
//           lie in the lanes as in device/patch.cuh, and stay in registers from the load to the store. The lanes divide
//           the keys among them, four pairs a lane; a key's lanes also find its row. All loads are issued before the
//           first is used, but for those of the angles, which wait for the position only.
// Numerics  The latents: those of rms_norm (its bits, for 257 to 512 latents), rounded to kv_c's type, and in the FP8
//           format of 656 bytes quantized as per_token_cast_to_fp8 does; without a norm, their own bits. The key:
//           float32, each product rounded, one rounding to what the cache stores. One scale for all: times its inverse,
//           in float32, and rounded to e4m3; beyond 448 is 448, and NaN stays NaN.
// Limits    any t, rank >= 1, even rope_dim >= 2; fewer than 2^31 slots. A token whose slot does not exist is not
//           written; a position outside the table counts as its first or last. Rows of more than 512 latents or 256
//           rotated channels, and those that are not aligned, are taken one element at a time.
// Source    DeepSeek-V2 report, arXiv:2405.04434, section 2.1.   Launched by launch/mla_cache_write.cu
#pragma once

#include <type_traits>

#include "device/fp8_row.h"
#include "device/patch.cuh"
#include "device/rotary.cuh"
#include "kernels/mla_cache_write_arguments.h"
#include "ptx/sync.cuh"

namespace dso {

inline constexpr int kCacheWriteThreads = 256;

inline constexpr int64_t kNoRow = -1;

/// Where the row that a slot names begins in the cache, in bytes; kNoRow, if there is none.
DSO_DEVICE int64_t row_of_slot(const MlaCacheWriteArguments& arguments, int64_t slot) {
    if (slot < 0 || slot >= arguments.num_slots) return kNoRow;
    const uint32_t page = static_cast<uint32_t>(slot) / arguments.page_size;
    const uint32_t offset = static_cast<uint32_t>(slot) - page * arguments.page_size;
    return page * arguments.page_stride_bytes + offset * arguments.row_stride_bytes;
}

/// Four pairs in e4m3, as rotate_pairs leaves them; vectorized, the row is aligned to 8 bytes.
template <bool kVectorized>
DSO_DEVICE void store_e4m3_pairs(uint8_t* row, uint2 values, int pair, int half, bool interleaved) {
    if (interleaved) {
        store_e4m3<kVectorized>(row + 2 * pair, values, 2 * (half - pair));
    } else if (kVectorized) {
        if (pair >= half) return;
        *reinterpret_cast<uint32_t*>(row + pair) = values.x;
        *reinterpret_cast<uint32_t*>(row + half + pair) = values.y;
    } else {
        store_e4m3<false>(row + pair, make_uint2(values.x, 0), min(half - pair, kRotaryPairs));
        store_e4m3<false>(row + half + pair, make_uint2(values.y, 0), min(half - pair, kRotaryPairs));
    }
}

template <typename T, typename Weight, bool kNorm, LatentFormat kFormat, int kRows, bool kVectorized>
__global__ void __launch_bounds__(kCacheWriteThreads, kRows == 1 ? 1 : 2)
    mla_cache_write_kernel(const __grid_constant__ MlaCacheWriteArguments arguments) {
    constexpr int kKeyLanes = 32 / kRows;
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    const int64_t token = (int64_t{blockIdx.x} * blockDim.y + threadIdx.y) * kRows;
    const int64_t rows_left = arguments.num_tokens - token;
    if (rows_left <= 0) return;
    const int lane = static_cast<int>(threadIdx.x), rank = arguments.kv_lora_rank, half = arguments.rope_dim / 2;
    const int column = lane / kPatchLanes * kQuantizeBlock + lane % kPatchLanes * kChunk;
    const T* latents = static_cast<const T*>(arguments.kv_c) + token * arguments.kv_c_stride + column;
    const auto* weight = static_cast<const Weight*>(arguments.norm_weight) + column;

    // The token whose key, and whose place in the cache, are this lane's business.
    const int64_t own = token + min(int64_t{lane / kKeyLanes}, rows_left - 1);
    const int64_t slot = lane / kKeyLanes < rows_left ? arguments.slots[own] : -1;
    const int64_t position = clamp_position(arguments.positions[own], arguments.max_position);
    Chunk<T> x[kRows][kPatchChunks];
    Chunk<Weight> weights[1][kPatchChunks];
    load_patch<kRows, kVectorized>(x, latents, arguments.kv_c_stride, rows_left, rank - column);
    if constexpr (kNorm && kRows == 1) load_patch<1, kVectorized>(weights, weight, 0, 1, rank - column);
    const T* key = static_cast<const T*>(arguments.k_pe) + own * arguments.k_pe_stride;
    const float* angles_row = arguments.cos_sin + position * (2 * half);
    int pair = lane % kKeyLanes * kRotaryPairs;
    Chunk<T> pairs = load_pairs<kVectorized>(key, pair, half, arguments.interleaved);
    RotaryAngles angles = load_rotary_angles<kVectorized>(angles_row, pair, half);
    const int64_t own_row = row_of_slot(arguments, slot);
    const auto row_of = [&](int r) { return kRows == 1 ? own_row : __shfl_sync(0xFFFFFFFF, own_row, r * kKeyLanes); };

    // A panel is what the lanes hold at once.
    const int panels_end = kVectorized ? 1 : rank;
    float scales[kRows];
    if constexpr (kNorm) {
        float sums[kRows] = {};
        for (int panel = 0; panel < panels_end; panel += kPatchColumns) {
            if (panel > 0)
                load_patch<kRows, false>(x, latents + panel, arguments.kv_c_stride, rows_left, rank - column - panel);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
                for (int i = 0; i < kPatchChunks; ++i) {
                    float values[kChunk];
                    to_floats(x[r][i], values);
#pragma unroll
                    for (int j = 0; j < kChunk; ++j) sums[r] = __fmaf_rn(values[j], values[j], sums[r]);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2) sums[r] += __shfl_xor_sync(0xFFFFFFFF, sums[r], offset);
            scales[r] = rsqrtf(__fmaf_rn(sums[r], arguments.inverse_rank, arguments.eps));
        }
    }
    for (int panel = 0; panel < panels_end; panel += kPatchColumns) {
        const int columns_left = rank - column - panel;
        if (!kVectorized && rank > kPatchColumns) {
            load_patch<kRows, false>(x, latents + panel, arguments.kv_c_stride, rows_left, columns_left);
            if constexpr (kNorm) load_patch<1, false>(weights, weight + panel, 0, 1, columns_left);
        }
        if constexpr (kNorm) {
            // Many tokens find them in the cache, and need the registers until here.
            if constexpr (kRows > 1) load_patch<1, kVectorized>(weights, weight, 0, 1, rank - column);
#pragma unroll
            for (int i = 0; i < kPatchChunks; ++i) {
                float factors[kChunk];
                to_floats(weights[0][i], factors);
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    float values[kChunk];
                    to_floats(x[r][i], values);
#pragma unroll
                    for (int j = 0; j < kChunk; ++j) values[j] = values[j] * scales[r] * factors[j];
                    x[r][i] = round_to<T>(values);
                }
            }
        }
        if constexpr (kFormat == LatentFormat::kFp8Blocks) {
            const auto blocks = scale_blocks<kPatchLanes, kRows>(x, arguments.amax_floor, false);
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int64_t row = row_of(r);
                uint8_t* target = arguments.kv_cache + row + column;
#pragma unroll
                for (int i = 0; i < kPatchChunks; ++i)
                    store_e4m3<kVectorized>(target + i * kPatchChunkStep, cast_chunk(x[r][i], blocks.inverse[r]),
                                            row != kNoRow ? kChunk : 0);
            }
            const int64_t row = row_of(lane % kPatchLanes % kRows);
            auto* scales_of_row = reinterpret_cast<float*>(arguments.kv_cache + row + kFp8RowScales);
            if (row != kNoRow && lane % kPatchLanes < kRows) scales_of_row[lane / kPatchLanes] = blocks.sf;
        } else if constexpr (kFormat == LatentFormat::kFp8) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int64_t row = row_of(r);
                uint8_t* target = arguments.kv_cache + row + column;
#pragma unroll
                for (int i = 0; i < kPatchChunks; ++i)
                    store_e4m3<kVectorized>(target + i * kPatchChunkStep,
                                            cast_chunk(x[r][i], arguments.inverse_kv_scale),
                                            row != kNoRow ? kChunk : 0);
            }
        } else {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const int64_t row = row_of(r);
                T* target = reinterpret_cast<T*>(arguments.kv_cache + row) + column + panel;
#pragma unroll
                for (int i = 0; i < kPatchChunks; ++i)
                    store_chunk<kVectorized>(target + i * kPatchChunkStep, x[r][i],
                                             row != kNoRow ? columns_left - i * kPatchChunkStep : 0);
            }
        }
    }

    using Stored = std::conditional_t<kFormat == LatentFormat::kFp8Blocks, __nv_bfloat16, T>;
    const int key_offset = kFormat == LatentFormat::kFp8Blocks ? kFp8RowKey
                           : kFormat == LatentFormat::kFp8     ? rank
                                                               : rank * static_cast<int>(sizeof(T));
    uint8_t* rotated = arguments.kv_cache + own_row + key_offset;
    while (own_row != kNoRow && pair < half) {
        float values[kChunk];
        to_floats(pairs, values);
        rotate_pairs(values, angles, arguments.interleaved);
        if constexpr (kFormat == LatentFormat::kFp8) {
            store_e4m3_pairs<kVectorized>(rotated, cast_floats(values, arguments.inverse_kv_scale), pair, half,
                                          arguments.interleaved);
        } else {
            store_pairs<kVectorized>(reinterpret_cast<Stored*>(rotated), round_to<Stored>(values), pair, half,
                                     arguments.interleaved);
        }
        if (kVectorized) break;
        pair += kKeyLanes * kRotaryPairs;
        pairs = load_pairs<kVectorized>(key, pair, half, arguments.interleaved);
        angles = load_rotary_angles<kVectorized>(angles_row, pair, half);
    }
}

}  // namespace dso
