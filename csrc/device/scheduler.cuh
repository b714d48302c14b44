// Which output tile a persistent CTA computes next. Pure arithmetic: the host enumerates it in tests/host.
#pragma once

#include "device/math.cuh"

namespace dso {

struct Tile {
    int m_block, n_block;
};

/// Rasterization: tile `index` of a grid of tiles, in bands of kBandHeight rows of tiles, column by column within a
/// band. So the tiles in flight at one time form a compact patch, and their A and B blocks are read from L2, not from
/// memory.
inline constexpr int kBandHeight = 8;

DSO_HOST_DEVICE Tile rasterize(int index, int num_m_blocks, int num_n_blocks) {
    if (num_m_blocks == 1) return {0, index};  // few rows want to be told soon
    const int tiles_per_band = kBandHeight * num_n_blocks;
    const int band = index / tiles_per_band, in_band = index % tiles_per_band;
    const int first_row = band * kBandHeight;
    const int height = num_m_blocks - first_row < kBandHeight ? num_m_blocks - first_row : kBandHeight;
    return {first_row + in_band % height, in_band / height};
}

/// The tiles of a run of rows, whose last block of rows may be lower than the others. Lower tiles take less time, and
/// among the others they would set their CTAs ahead: what neighbours read from L2 at the same time, it delivers once.
/// So they come last, where they also fill the last wave.
DSO_HOST_DEVICE Tile rasterize_low_block_last(int index, int num_rows, int block_rows, int num_n_blocks) {
    const int num_full = num_rows / block_rows, num_full_tiles = num_full * num_n_blocks;
    if (index >= num_full_tiles) return {num_full, index - num_full_tiles};
    return rasterize(index, num_full, num_n_blocks);
}

/// A block of so few rows is one warpgroup's: in a tile of several the others would have none.
inline constexpr int kLowRows = 64;
/// Blocks of columns of a wide tile, where there are such tiles: two warpgroups have the same low rows.
inline constexpr int kWideBlocks = 2;

DSO_HOST_DEVICE constexpr bool ends_low(int64_t num_rows, int64_t block_rows) {
    return num_rows % block_rows > 0 && num_rows % block_rows <= kLowRows;
}

/// The tiles of a run of rows that ends low: below blocks of full height a row of wide tiles. (Of an odd number of
/// blocks of columns the last has one.)
struct LowEndedGrid {
    int num_full, num_n_blocks;  // blocks of full height; of columns

    DSO_HOST_DEVICE int num_full_tiles() const { return num_full * num_n_blocks; }
    DSO_HOST_DEVICE int num_wide() const { return ceil_div(num_n_blocks, kWideBlocks); }
    DSO_HOST_DEVICE int num_tiles() const { return num_full_tiles() + num_wide(); }
};

/// The wide tiles last. A tile is wide if its block of rows is `num_full`; its first block of columns is told.
DSO_HOST_DEVICE Tile rasterize_wide_last(int index, const LowEndedGrid& grid) {
    const int wide = index - grid.num_full_tiles();
    if (wide >= 0) return {grid.num_full, wide * kWideBlocks};
    return rasterize(index, grid.num_full, grid.num_n_blocks);
}

/// The wide tiles each in the last band, after those above it, but for `num_late`: these are the last of all.
DSO_HOST_DEVICE Tile rasterize_wide_late(int index, const LowEndedGrid& grid, int num_late) {
    const int late = index - (grid.num_tiles() - num_late), num_early = grid.num_wide() - num_late;
    if (late >= 0) return {grid.num_full, (num_early + late) * kWideBlocks};
    const int first_row = (grid.num_full - 1) / kBandHeight * kBandHeight;  // of the last band
    int in_band = index - first_row * grid.num_n_blocks;
    if (in_band < 0) return rasterize(index, first_row, grid.num_n_blocks);
    const int height = grid.num_full - first_row, per_wide = kWideBlocks * height + 1;
    int column = 0;
    if (in_band < num_early * per_wide) {
        column = in_band / per_wide * kWideBlocks;
        in_band %= per_wide;
        const int num_columns = grid.num_n_blocks - column < kWideBlocks ? grid.num_n_blocks - column : kWideBlocks;
        if (in_band == num_columns * height) return {grid.num_full, column};
    } else {
        column = num_early * kWideBlocks;
        in_band -= num_early * per_wide;
    }
    return {first_row + in_band % height, column + in_band / height};
}

}  // namespace dso
