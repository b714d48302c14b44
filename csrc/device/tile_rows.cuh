// Where the rows of a tile lie in the output, and which of them are the tile's own.
#pragma once

#include "device/direct_output.h"
#include "device/row_layout.h"
#include "device/tile_queue.cuh"

namespace dso {

DSO_DEVICE int64_t row_offset(const DirectOutput& output, const GemmTile& tile, int row) {
    return tile.a_matrix * output.stride_matrix + (tile.first_row + row) * output.stride;
}

/// Rows of a contiguous layout each say whose they are.
DSO_DEVICE bool is_owned(const RowSchedule& schedule, const GemmTile& tile, int row) {
    return row < tile.num_rows &&
           (schedule.row_layout != RowLayout::kContiguous || schedule.layout[tile.first_row + row] == tile.b_matrix);
}

}  // namespace dso
