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

}  // namespace dso
