// A warpgroup's 64 rows of sums to an output, whole tiles at a time: by TMA, or straight from registers.
#pragma once

#include "device/direct_output.h"
#include "device/tile.cuh"
#include "ptx/matrix.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"

namespace dso {

/// Where the 64 rows and the tile's columns begin in an output of `num_rows` by `num_columns` a matrix.
struct TilePlace {
    int matrix, row, column;
    int num_rows, num_columns;
};

/// As bfloat16 through panels of 64 columns under the swizzle. The stores run on: `tma_store_wait_read` before shared
/// memory ends. `barrier` is a named one of the warpgroup's own.
template <int kNumSums>
DSO_DEVICE void store_tile_by_tma(uint8_t (&panels)[kNumSums / 32][64 * kSwizzleBytes], const TensorMap* map_d,
                                  const float (&sum)[kNumSums], uint32_t barrier, const TilePlace& place) {
    const uint32_t thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
    if (thread == 0) ptx::tma_store_wait_read<0>();  // the previous tile has left the panels
    ptx::named_barrier_sync(barrier, 128);
#pragma unroll
    for (int j = 0; j < kNumSums / 8; ++j) {
        const float* x = &sum[8 * j];
        ptx::stmatrix_x4(panels[j / 4] + swizzled_offset(warp * 16 + lane % 16, j % 4 * 2 + lane / 16),
                         ptx::pack_bf16x2(x[0], x[1]), ptx::pack_bf16x2(x[2], x[3]), ptx::pack_bf16x2(x[4], x[5]),
                         ptx::pack_bf16x2(x[6], x[7]));
    }
    ptx::fence_proxy_async_shared();
    ptx::named_barrier_sync(barrier, 128);
    if (thread == 0) {
#pragma unroll
        for (int panel = 0; panel < kNumSums / 32; ++panel) {
            if (place.row < place.num_rows && place.column + panel * 64 < place.num_columns)
                ptx::tma_store_3d(map_d, panels[panel], place.column + panel * 64, place.row, place.matrix);
        }
        ptx::tma_store_commit();
    }
}

/// Four neighbours, the first at an `offset` that is a multiple of four.
DSO_DEVICE float4 load_quad(const DirectOutput& output, int64_t offset) {
    if (!output.is_bf16) return *reinterpret_cast<const float4*>(static_cast<const float*>(output.d) + offset);
    const uint2 x = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(output.d) + offset);
    return {__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xFFFF0000u), __uint_as_float(x.y << 16),
            __uint_as_float(x.y & 0xFFFF0000u)};
}

DSO_DEVICE void store_quad(const DirectOutput& output, int64_t offset, float4 x) {
    if (output.is_bf16) {
        *reinterpret_cast<uint2*>(static_cast<uint16_t*>(output.d) + offset) =
            uint2{ptx::pack_bf16x2(x.x, x.y), ptx::pack_bf16x2(x.z, x.w)};
    } else {
        *reinterpret_cast<float4*>(static_cast<float*>(output.d) + offset) = x;
    }
}

/// Overwritten or added to. A lane has pairs of neighbours in two rows; two lanes exchange pairs, so that each has four
/// neighbours in one row.
template <int kNumSums>
DSO_DEVICE void store_tile_direct(const DirectOutput& output, const float (&sum)[kNumSums], const TilePlace& place) {
    const int lane = threadIdx.x % 32;
    const bool is_lower = lane % 2;
    const int row = place.row + threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * is_lower;
    const int column = place.column + lane % 4 / 2 * 4;
    const int64_t first = place.matrix * output.stride_matrix + row * output.stride + column;
    const int num_columns = row < place.num_rows ? place.num_columns - column : 0;

    float4 old[kNumSums / 4];  // all of them asked for before the first is waited for
#pragma unroll
    for (int j = 0; j < kNumSums / 4; ++j) {
        old[j] = float4{};
        if (output.accumulate && 8 * j < num_columns) old[j] = load_quad(output, first + 8 * j);
    }
#pragma unroll
    for (int j = 0; j < kNumSums / 4; ++j) {
        const float* x = &sum[4 * j];
        const float even = __shfl_xor_sync(0xFFFFFFFF, is_lower ? x[0] : x[2], 1);
        const float odd = __shfl_xor_sync(0xFFFFFFFF, is_lower ? x[1] : x[3], 1);
        float4 quad = is_lower ? float4{even, odd, x[2], x[3]} : float4{x[0], x[1], even, odd};
        if (output.accumulate) quad = {quad.x + old[j].x, quad.y + old[j].y, quad.z + old[j].z, quad.w + old[j].w};
        if (8 * j < num_columns) store_quad(output, first + 8 * j, quad);
    }
}

}  // namespace dso
