// How the warps of a grid divide [num_groups, m, k] among them: in patches of kRows rows by 512 columns.
//
// A row of a patch is four blocks of 128 side by side, eight lanes a block; a lane has the chunks at 8 * lane and, 64
// columns further, its second. So each load of a warp covers whole lines of memory, and so does each store. The grid is
// (columns, rows, groups): neighbouring CTAs read on along a row, and nothing is divided to find one's place.
#pragma once

#include "device/cast_blocks.cuh"
#include "device/cast_output.h"

namespace dso {

inline constexpr int kPatchThreads = 256;
inline constexpr int kPatchWarps = kPatchThreads / 32;  // of a CTA, one above the other
inline constexpr int kPatchLanes = 8;                   // of a block of 128
inline constexpr int kPatchChunks = kQuantizeBlock / kChunk / kPatchLanes;
inline constexpr int kPatchColumns = 32 / kPatchLanes * kQuantizeBlock;

/// The column of the calling lane's first chunk; chunk i is i * kPatchChunkStep further.
inline constexpr int kPatchChunkStep = kPatchLanes * kChunk;
DSO_DEVICE uint32_t patch_column() {
    const uint32_t lane = threadIdx.x % 32;
    return blockIdx.x * kPatchColumns + lane / kPatchLanes * kQuantizeBlock + lane % kPatchLanes * kChunk;
}

/// The first row of the calling warp's first patch, and how much further its next is.
template <int kRows>
DSO_DEVICE int64_t patch_row() {
    return (int64_t{blockIdx.y} * kPatchWarps + threadIdx.x / 32) * kRows;
}
template <int kRows>
DSO_DEVICE int64_t patch_row_step() {
    return int64_t{gridDim.y} * kPatchWarps * kRows;
}

/// Loads the calling lane's chunks of a patch whose first row is at `source`; zeros where rows or columns end.
template <int kRows, bool kVectorized, typename T>
DSO_DEVICE void load_patch(Chunk<T> (&x)[kRows][kPatchChunks], const T* source, int64_t stride, int64_t rows_left,
                           int columns_left) {
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int i = 0; i < kPatchChunks; ++i)
            x[row][i] = load_chunk<kVectorized>(source + row * stride + i * kPatchChunkStep,
                                                row < rows_left ? columns_left - i * kPatchChunkStep : 0);
    }
}

/// Quantizes a patch whose first row is `row` of `group` in [num_groups, m, k], and stores values and scales.
template <int kRows, bool kVectorized, typename T>
DSO_DEVICE void cast_patch(const Chunk<T> (&x)[kRows][kPatchChunks], const CastOutput& output, int64_t group,
                           int64_t row, uint32_t column, int64_t m, int64_t k) {
    const auto scales = scale_blocks<kPatchLanes, kRows>(x, output.amax_floor, output.use_ue8m0);
    const int columns_left = static_cast<int>(k - column);
    uint8_t* q = output.q + (group * m + row) * k + column;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < kPatchChunks; ++i)
            store_e4m3<kVectorized>(q + r * k + i * kPatchChunkStep, cast_chunk(x[r][i], scales.inverse[r]),
                                    row + r < m ? columns_left - i * kPatchChunkStep : 0);
    }
    const int own_row = threadIdx.x % kPatchLanes;
    const uint32_t k_block = column / kQuantizeBlock;
    if (own_row < kRows && row + own_row < m && int64_t{k_block} * kQuantizeBlock < k) {
        output
            .sf[group * output.sf_stride_group + (row + own_row) * output.sf_stride_m + k_block * output.sf_stride_k] =
            scales.sf;
    }
}

}  // namespace dso
