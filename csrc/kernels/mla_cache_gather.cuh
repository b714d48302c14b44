// A batch's tokens out of the paged latent cache:   out[cu_seqlens[i] + j, :] = the row of token j of request i
//
//   kv_cache     [pages, page_size, d]   bf16, f16 or f32, rows contiguous, or an FP8 format (device/fp8_row.h)
//   block_table  [b, max_pages]          int32, rows contiguous
//   cu_seqlens   [b + 1]                 int32; an offset counts as the largest so far
//   out          [total, d]              bf16, f16 or f32, contiguous       16-byte stores where all is aligned
//
// Work      A CTA has a few neighbouring rows of the output. Each of its warps finds the sources of some of them: it
//           looks at 32 offsets at a time for the first above its row. Then the threads copy eight channels at a time,
//           neighbours in the row; a few are loaded before the first is stored.
// Numerics  What has out's type is copied; else rounded once from float32. FP8: value times scale in float32.
// Limits    Any values of the table and the offsets: a row that is nobody's, past its table's end, or of a page that
//           does not exist becomes zeros. Fewer than 2^31 rows, d below 2^26.   Launched by launch/mla_cache_gather.cu
#pragma once

#include <type_traits>

#include "device/chunk.cuh"
#include "device/fp8_row.h"
#include "device/math.cuh"
#include "kernels/mla_cache_gather_arguments.h"
#include "ptx/shared_memory.cuh"
#include "ptx/sync.cuh"

namespace dso {

inline constexpr int kGatherThreads = 256;
inline constexpr int kGatherMaxRows = 32;
inline constexpr int kGatherChunks = 3;  // of a thread: loaded before the first is stored
inline constexpr int64_t kNoSource = -1;

struct GatherShared {
    int64_t sources[kGatherMaxRows];
};

/// Say that rows of the cache are in an FP8 format: with scales in each, or with one for all.
struct Fp8BlocksRow {};
struct Fp8Row {};

/// Where the row of the cache begins that belongs at `row` of the output, in bytes, or kNoSource. For whole warps.
DSO_DEVICE int64_t find_source(const MlaCacheGatherArguments& arguments, int64_t row) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    int start = 0;  // of the request before the offset that is looked at
    for (int64_t first = 0; first <= arguments.b; first += 32) {
        const int offset = first + lane <= arguments.b ? max(arguments.cu_seqlens[first + lane], 0) : 0;
        const int num_before = __ffs(__ballot_sync(0xFFFFFFFF, offset > row)) - 1;
        start = max(start, __reduce_max_sync(0xFFFFFFFF, num_before < 0 || lane < num_before ? offset : 0));
        if (num_before < 0) continue;
        const int64_t request = first + num_before - 1, token = row - start, place = token / arguments.page_size;
        if (request < 0 || place >= arguments.max_pages) return kNoSource;
        const int page = arguments.block_table[request * arguments.table_stride + place];
        if (page < 0 || page >= arguments.num_pages) return kNoSource;
        return page * arguments.page_stride + token % arguments.page_size * arguments.row_stride;
    }
    return kNoSource;
}

/// Eight e4m3 values times a scale.
DSO_DEVICE void dequantize(uint2 bytes, float scale, float (&values)[kChunk]) {
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
        const uint32_t word = i < 2 ? bytes.x : bytes.y;
        const float2 pair = ptx::unpack_f16x2(ptx::unpack_e4m3x2(static_cast<uint16_t>(word >> (16 * (i % 2)))));
        values[2 * i] = pair.x * scale;
        values[2 * i + 1] = pair.y * scale;
    }
}

/// Eight channels of a row, or what is left of it, in out's type.
template <typename Out, bool kVectorized, typename T>
DSO_DEVICE Chunk<Out> load_channels(const uint8_t* row, int channel, int count, float, T) {
    const auto chunk = load_chunk<kVectorized>(reinterpret_cast<const T*>(row) + channel, count);
    if constexpr (std::is_same_v<T, Out>) {
        return chunk;
    } else {
        float values[kChunk];
        to_floats(chunk, values);
        return round_to<Out>(values);
    }
}

template <typename Out, bool kVectorized>
DSO_DEVICE Chunk<Out> load_channels(const uint8_t* row, int channel, int, float kv_scale, Fp8Row) {
    float values[kChunk];
    dequantize(*reinterpret_cast<const uint2*>(row + channel), kv_scale, values);
    return round_to<Out>(values);
}

template <typename Out, bool kVectorized>
DSO_DEVICE Chunk<Out> load_channels(const uint8_t* row, int channel, int, float, Fp8BlocksRow) {
    float values[kChunk];
    if (channel >= kFp8RowScales) {
        const auto* key = reinterpret_cast<const __nv_bfloat16*>(row + kFp8RowKey);
        to_floats(load_chunk<true>(key + channel - kFp8RowScales, kChunk), values);
    } else {
        const float scale = reinterpret_cast<const float*>(row + kFp8RowScales)[channel / kFp8RowBlock];
        dequantize(*reinterpret_cast<const uint2*>(row + channel), scale, values);
    }
    return round_to<Out>(values);
}

/// `Row` is the type of the cache's channels, or says the format.
template <typename Row, typename Out, bool kVectorized>
__global__ void __launch_bounds__(kGatherThreads)
    mla_cache_gather_kernel(const __grid_constant__ MlaCacheGatherArguments arguments) {
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    auto& sources = ptx::static_shared<GatherShared>().sources;
    const int thread = static_cast<int>(threadIdx.x);
    const int64_t first_row = int64_t{blockIdx.x} * arguments.rows_of_cta;
    const int num_rows = static_cast<int>(min(arguments.total - first_row, int64_t{arguments.rows_of_cta}));
    for (int row = thread / 32; row < num_rows; row += kGatherThreads / 32) {
        const int64_t source = find_source(arguments, first_row + row);
        if (thread % 32 == 0) sources[row] = source;
    }
    __syncthreads();

    const int chunks_of_row = ceil_div(arguments.d, kChunk), num_chunks = num_rows * chunks_of_row;
    auto* out = static_cast<Out*>(arguments.out) + first_row * arguments.d;
    for (int first = thread; first < num_chunks; first += kGatherThreads * kGatherChunks) {
        Chunk<Out> chunks[kGatherChunks];
#pragma unroll
        for (int i = 0; i < kGatherChunks; ++i) {
            const int at = first + i * kGatherThreads;
            chunks[i] = Chunk<Out>{};
            if (at >= num_chunks) continue;
            const int64_t source = sources[at / chunks_of_row];
            const int channel = at % chunks_of_row * kChunk;
            if (source != kNoSource)
                chunks[i] = load_channels<Out, kVectorized>(arguments.kv_cache + source, channel, arguments.d - channel,
                                                            arguments.kv_scale, Row{});
        }
#pragma unroll
        for (int i = 0; i < kGatherChunks; ++i) {
            const int at = first + i * kGatherThreads;
            if (at >= num_chunks) continue;
            const int channel = at % chunks_of_row * kChunk;
            store_chunk<kVectorized>(out + int64_t{at / chunks_of_row} * arguments.d + channel, chunks[i],
                                     arguments.d - channel);
        }
    }
}

}  // namespace dso
