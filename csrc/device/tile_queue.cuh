// Tiles from the one warp that schedules to the warps that compute them.
#pragma once

#include "ptx/mbarrier.cuh"

namespace dso {

/// A tile of a GEMM of one or more groups: which rows of A meet which rows of B.
struct GemmTile {
    int first_row, num_rows;        // of A, within its matrix; no rows: there is no further tile
    int a_matrix, b_matrix;         // which of the matrices that A and B consist of; A's is D's, too
    int first_column, num_columns;  // of D, which are rows of B; they may be beyond its last
};

/// A ring of two tiles; lives in shared memory. Each side counts what it has pushed or popped.
template <typename Tile>
struct WorkQueue {
    Tile tiles[2];
    uint64_t full[2], empty[2];

    /// By one thread; the CTA must synchronise before the first use.
    DSO_DEVICE void init(uint32_t num_consumer_warps) {
        for (int i = 0; i < 2; ++i) {
            ptx::mbarrier_init(&full[i], 1);
            ptx::mbarrier_init(&empty[i], num_consumer_warps);
        }
        ptx::fence_mbarrier_init();
    }

    /// By all lanes of one warp.
    DSO_DEVICE void push(uint32_t& count, const Tile& tile) {
        const uint32_t i = count % 2;
        ptx::mbarrier_wait(&empty[i], (count / 2 + 1) % 2);
        if (threadIdx.x % 32 == 0) {
            tiles[i] = tile;
            ptx::mbarrier_arrive(&full[i]);
        }
        ++count;
    }

    /// The next tile; by all lanes of each consumer warp. It stays where it is until `pop`.
    DSO_DEVICE const Tile& front(uint32_t count) {
        ptx::mbarrier_wait(&full[count % 2], count / 2 % 2);
        return tiles[count % 2];
    }

    DSO_DEVICE void pop(uint32_t& count) {
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&empty[count % 2]);
        ++count;
    }
};

using TileQueue = WorkQueue<GemmTile>;

}  // namespace dso
