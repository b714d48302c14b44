// Zeros in the rows of d that are nobody's, or in the others:   d[r, :] = 0   where the layout gives r to no group
//
//   layout  int32, as device/row_layout.h says
//   d       [matrices, m, n]  rows contiguous, aligned to 16 bytes and a multiple of that long   16-byte stores
//
// Work      a warp a row; the other rows are not touched.   Launched by launch/clear_rows.cu
#pragma once

#include "kernels/clear_rows_arguments.h"

namespace dso {

inline constexpr int kClearThreads = 256;

/// Offsets never decrease, each counting as the largest so far: the owned rows are one run.
DSO_DEVICE bool is_between_offsets(const RowSchedule& schedule, int row) {
    if (schedule.num_groups == 0 || row < schedule.layout[0]) return false;
    bool before_one = false;
    for (int i = 1 + threadIdx.x % 32; i <= schedule.num_groups; i += 32) before_one |= row < schedule.layout[i];
    return __any_sync(0xFFFFFFFF, before_one);
}

__global__ void __launch_bounds__(kClearThreads)
    clear_rows_kernel(const __grid_constant__ ClearRowsArguments arguments) {
    const RowSchedule& schedule = arguments.schedule;
    const int64_t num_rows = arguments.num_matrices * schedule.m;
    const int64_t step = int64_t{gridDim.x} * (kClearThreads / 32);
    for (int64_t i = int64_t{blockIdx.x} * (kClearThreads / 32) + threadIdx.x / 32; i < num_rows; i += step) {
        const int64_t matrix = i / schedule.m;
        const int row = static_cast<int>(i % schedule.m);
        bool owned;
        if (schedule.row_layout == RowLayout::kMasked) {
            owned = row < schedule.layout[matrix];
        } else if (schedule.row_layout == RowLayout::kOffsets) {
            owned = is_between_offsets(schedule, row);
        } else {
            owned = schedule.layout[row] >= 0 && schedule.layout[row] < schedule.num_groups;
        }
        if (owned != arguments.clears_owned) continue;
        uint8_t* first = arguments.d + matrix * arguments.matrix_bytes + row * arguments.row_stride_bytes;
        for (int64_t byte = threadIdx.x % 32 * 16; byte < arguments.row_bytes; byte += 32 * 16)
            *reinterpret_cast<uint4*>(first + byte) = make_uint4(0, 0, 0, 0);
    }
}

}  // namespace dso
