// Every tile of an output has one number, for every grid of tiles up to 130 x 130 and odd larger ones.
#include "device/scheduler.cuh"

#include <climits>
#include <vector>

#include "expect.h"

namespace {

long long num_grids = 0;

template <typename Place>
void enumerate(int num_m_blocks, int num_n_blocks, Place place) {
    std::vector<unsigned char> times(static_cast<size_t>(num_m_blocks) * num_n_blocks, 0);
    for (int i = 0; i < num_m_blocks * num_n_blocks; ++i) {
        const dso::Tile tile = place(i);
        EXPECT(tile.m_block >= 0 && tile.m_block < num_m_blocks && tile.n_block >= 0 && tile.n_block < num_n_blocks,
               "tile %d of %d x %d is (%d, %d)", i, num_m_blocks, num_n_blocks, tile.m_block, tile.n_block);
        ++times[static_cast<size_t>(tile.m_block) * num_n_blocks + tile.n_block];
    }
    for (size_t i = 0; i < times.size(); ++i)
        EXPECT(times[i] == 1, "tile %zu of %d x %d has %d numbers", i, num_m_blocks, num_n_blocks, times[i]);
    ++num_grids;
}

void enumerate(int num_m_blocks, int num_n_blocks) {
    enumerate(num_m_blocks, num_n_blocks, [=](int i) { return dso::rasterize(i, num_m_blocks, num_n_blocks); });
    constexpr int kBlockRows = 192;
    for (const int missing : {0, 1, 64, 191}) {
        const int num_rows = num_m_blocks * kBlockRows - missing;
        enumerate(num_m_blocks, num_n_blocks,
                  [=](int i) { return dso::rasterize_low_block_last(i, num_rows, kBlockRows, num_n_blocks); });
        // The low block's tiles, and no others, are the last.
        for (int i = 0; missing && i < num_m_blocks * num_n_blocks; ++i) {
            const dso::Tile tile = dso::rasterize_low_block_last(i, num_rows, kBlockRows, num_n_blocks);
            EXPECT((tile.m_block == num_m_blocks - 1) == (i >= (num_m_blocks - 1) * num_n_blocks),
                   "tile %d of %d rows is in block %d", i, num_rows, tile.m_block);
        }
    }
}

// Of blocks of full height and a low one below, whose tiles are wide: every block of every row, once; the late ones
// last.
void enumerate_wide(int num_full, int num_n_blocks) {
    const dso::LowEndedGrid grid{num_full, num_n_blocks};
    const auto covers_all = [&](const char* order, int num_last, auto place) {
        std::vector<unsigned char> times(static_cast<size_t>(num_full + 1) * num_n_blocks, 0);
        for (int i = 0; i < grid.num_tiles(); ++i) {
            const dso::Tile tile = place(i);
            EXPECT(tile.m_block >= 0 && tile.m_block <= num_full && tile.n_block >= 0 && tile.n_block < num_n_blocks,
                   "%s: tile %d of %d x %d is (%d, %d)", order, i, num_full, num_n_blocks, tile.m_block, tile.n_block);
            EXPECT(tile.m_block == num_full || i < grid.num_tiles() - num_last, "%s: tile %d of %d x %d is not wide",
                   order, i, num_full, num_n_blocks);
            const int width = tile.m_block == num_full ? dso::kWideBlocks : 1;
            for (int n = tile.n_block; n < tile.n_block + width && n < num_n_blocks; ++n)
                ++times[static_cast<size_t>(tile.m_block) * num_n_blocks + n];
        }
        for (size_t i = 0; i < times.size(); ++i)
            EXPECT(times[i] == 1, "%s: block %zu of %d x %d has %d numbers", order, i, num_full, num_n_blocks,
                   times[i]);
        ++num_grids;
    };
    covers_all("last", grid.num_wide(), [&](int i) { return dso::rasterize_wide_last(i, grid); });
    if (num_full == 0) return;
    for (const int num_late : {0, 1, grid.num_wide() / 2, grid.num_wide()})
        covers_all("late", num_late, [&](int i) { return dso::rasterize_wide_late(i, grid, num_late); });
}

// The last tiles of the largest outputs that the launcher accepts: no arithmetic leaves int (the build traps overflow).
void enumerate_the_end(int num_m_blocks, int num_n_blocks) {
    const int num_tiles = num_m_blocks * num_n_blocks;
    for (int i = num_tiles - 200; i < num_tiles; ++i) {
        const dso::Tile tile = dso::rasterize(i, num_m_blocks, num_n_blocks);
        EXPECT(tile.m_block >= 0 && tile.m_block < num_m_blocks && tile.n_block >= 0 && tile.n_block < num_n_blocks,
               "tile %d of %d x %d is (%d, %d)", i, num_m_blocks, num_n_blocks, tile.m_block, tile.n_block);
    }
    ++num_grids;
}

}  // namespace

int main() {
    for (int m = 1; m <= 130; ++m)
        for (int n = 1; n <= 130; ++n) enumerate(m, n);
    for (int num_full = 0; num_full <= 40; ++num_full)
        for (int n = 1; n <= 130; ++n) enumerate_wide(num_full, n);
    const int odd[] = {1, 2, 3, 5, 131, 132, 133, 264, 265, 1023, 4097};
    for (const int m : odd)
        for (const int n : odd)
            if (static_cast<long long>(m) * n < 2'000'000) enumerate(m, n);
    enumerate_the_end(1 << 15, 1 << 15);  // an extent below 2^31 is at most 2^25 tiles of 64
    enumerate_the_end(1 << 25, 32);
    enumerate_the_end(32, 1 << 25);
    enumerate_the_end((1 << 15) - 1, (1 << 15) + 1);
    std::printf("%lld grids, %lld checks\n", num_grids, num_checked);
}
