// Every tile of an output is dealt to one CTA, once, for every grid of tiles up to 130 x 130 and odd larger ones.
#include "device/scheduler.cuh"

#include <climits>
#include <vector>

#include "expect.h"

namespace {

long long num_schedules = 0;

void enumerate(int num_m_blocks, int num_n_blocks, int num_ctas) {
    std::vector<unsigned char> times(static_cast<size_t>(num_m_blocks) * num_n_blocks, 0);
    int fewest = INT_MAX, most = 0;
    for (int cta = 0; cta < num_ctas; ++cta) {
        dso::DenseScheduler scheduler(num_m_blocks, num_n_blocks, cta, num_ctas);
        int dealt = 0;
        for (dso::Tile tile; scheduler.next(tile); ++dealt) {
            EXPECT(tile.m_block >= 0 && tile.m_block < num_m_blocks && tile.n_block >= 0 && tile.n_block < num_n_blocks,
                   "tile (%d, %d) of %d x %d", tile.m_block, tile.n_block, num_m_blocks, num_n_blocks);
            ++times[static_cast<size_t>(tile.m_block) * num_n_blocks + tile.n_block];
        }
        dso::Tile none;
        EXPECT(!scheduler.next(none), "a finished scheduler went on: %d x %d", num_m_blocks, num_n_blocks);
        fewest = dealt < fewest ? dealt : fewest;
        most = dealt > most ? dealt : most;
    }
    for (size_t i = 0; i < times.size(); ++i)
        EXPECT(times[i] == 1, "tile %zu of %d x %d on %d CTAs is computed %d times", i, num_m_blocks, num_n_blocks,
               num_ctas, times[i]);
    EXPECT(most - fewest <= 1, "%d x %d on %d CTAs: one gets %d tiles, another %d", num_m_blocks, num_n_blocks,
           num_ctas, most, fewest);
    ++num_schedules;
}

// The last tiles of the largest outputs that the launcher accepts: no arithmetic leaves int (the build traps overflow).
void enumerate_the_end(int num_m_blocks, int num_n_blocks, int num_ctas) {
    const long long num_tiles = dso::DenseScheduler::num_tiles(num_m_blocks, num_n_blocks);
    for (int cta = 0; cta < num_ctas; ++cta) {
        const int last = static_cast<int>(num_tiles) - num_ctas + cta;
        dso::DenseScheduler scheduler(num_m_blocks, num_n_blocks, last, num_ctas);
        dso::Tile tile;
        EXPECT(scheduler.next(tile), "tile %d of %lld", last, num_tiles);
        EXPECT(tile.m_block >= 0 && tile.m_block < num_m_blocks && tile.n_block >= 0 && tile.n_block < num_n_blocks,
               "tile %d of %d x %d is (%d, %d)", last, num_m_blocks, num_n_blocks, tile.m_block, tile.n_block);
        EXPECT(!scheduler.next(tile), "tile %d is the CTA's last", last);
    }
    ++num_schedules;
}

}  // namespace

int main() {
    for (int m = 1; m <= 130; ++m)
        for (int n = 1; n <= 130; ++n)
            for (const int num_ctas : {1, 2, 7, 66, 131, 132}) enumerate(m, n, num_ctas);
    const int odd[] = {1, 2, 3, 5, 131, 132, 133, 264, 265, 1023, 4097};
    for (const int m : odd)
        for (const int n : odd)
            for (const int num_ctas : {1, 78, 114, 132, 160}) enumerate(m, n, num_ctas);
    for (const int num_ctas : {1, 78, 132, 160}) {  // an extent below 2^31 is at most 2^25 tiles of 64
        enumerate_the_end(1 << 15, 1 << 15, num_ctas);
        enumerate_the_end(1 << 25, 32, num_ctas);
        enumerate_the_end(32, 1 << 25, num_ctas);
        enumerate_the_end((1 << 15) - 1, (1 << 15) + 1, num_ctas);
    }
    std::printf("%lld schedules, %lld checks\n", num_schedules, num_checked);
}
