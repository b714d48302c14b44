// Which output tile a persistent CTA computes next. Pure arithmetic: the host enumerates it in tests/host.
#pragma once

#include "device/math.cuh"

namespace dso {

struct Tile {
    int m_block, n_block;
};

/// The tiles of one dense [m, n] output, dealt to `num_ctas` persistent CTAs in turn.
///
/// Rasterization: bands of kBandHeight rows of tiles, column by column within a band, so that the tiles in flight at
/// one time form a compact patch and their A and B blocks are read from L2, not from memory.
class DenseScheduler {
  public:
    static constexpr int kBandHeight = 8;

    DSO_HOST_DEVICE DenseScheduler(int num_m_blocks, int num_n_blocks, int cta, int num_ctas)
        : num_m_blocks_(num_m_blocks), num_n_blocks_(num_n_blocks), next_(cta), step_(num_ctas) {}

    /// The number of tiles of an output; host planners check that it fits an int.
    DSO_HOST_DEVICE static constexpr int64_t num_tiles(int64_t num_m_blocks, int64_t num_n_blocks) {
        return num_m_blocks * num_n_blocks;
    }

    /// Writes the CTA's next tile, or returns false when there is none.
    DSO_HOST_DEVICE bool next(Tile& tile) {
        if (next_ >= num_m_blocks_ * num_n_blocks_) return false;
        const int tiles_per_band = kBandHeight * num_n_blocks_;
        const int band = next_ / tiles_per_band, in_band = next_ % tiles_per_band;
        const int first_row = band * kBandHeight;
        const int height = num_m_blocks_ - first_row < kBandHeight ? num_m_blocks_ - first_row : kBandHeight;
        tile.m_block = first_row + in_band % height;
        tile.n_block = in_band / height;
        next_ += step_;
        return true;
    }

  private:
    int num_m_blocks_, num_n_blocks_, next_, step_;
};

}  // namespace dso
