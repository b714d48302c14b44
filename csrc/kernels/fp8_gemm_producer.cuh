// The loading side of the FP8 GEMM kernels: three warps that keep the ring of stages filled; the first also schedules.
//
// One warp alone would take longer to issue a step's loads than small tiles take to multiply them: each of the three
// has a loop of its own, and all meet at the stage's full barrier. A loop is run by the whole warp, though one lane
// does the work: what is uniform in the warp is computed by the uniform datapath, and where lanes part that cannot be
// used.
//
// A stage is a step of 128 of K: a tile's rows of b, its rows of a, a float of sfa for each of these, and one of sfb
// for each block of columns. `Shared` has them as b_of, a_of, sfa and sfb, with `pipeline` and `queue`.
#pragma once

#include "device/pipeline.cuh"
#include "device/row_scheduler.cuh"
#include "kernels/fp8_gemm_arguments.h"
#include "ptx/cluster.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"

namespace dso {

/// The blocks of 128 of K, from `first` to `last`, that this CTA of a cluster computes.
struct SplitK {
    int first, last;
};

template <typename Shape>
DSO_DEVICE SplitK split_k(int k) {
    const int num_k_blocks = ceil_div(k, Shape::BLOCK_K);
    if constexpr (!Shape::kCanSplit) return {0, num_k_blocks};
    const int rank = ptx::cluster_rank(), size = ptx::cluster_size();
    return {num_k_blocks * rank / size, num_k_blocks * (rank + 1) / size};
}

/// A step of `tile`'s columns of b, in boxes, of which a narrow tile has fewer and a wide one more. By one lane.
template <typename Shape, typename Shared>
DSO_DEVICE void load_step_of_b(Shared& shared, const TensorMap* map_b, const Fp8GemmArguments& arguments,
                               const GemmTile& tile, int k_block, uint32_t stage, uint64_t* barrier) {
    const int box_rows = arguments.b_box_rows;
    uint8_t* const b = shared.b_of(stage, tile);
    ptx::mbarrier_arrive_expect_tx(barrier, tile.num_columns * Shape::BLOCK_K);
#pragma unroll
    for (int i = 0; i < Shape::kMostColumns / Shape::kColumnStep; ++i) {
        if (i * box_rows < tile.num_columns)
            ptx::tma_load_3d(b + i * box_rows * Shape::BLOCK_K, map_b, barrier, k_block * Shape::BLOCK_K,
                             tile.first_column + i * box_rows, tile.b_matrix);
    }
}

/// The first stages of b, asked for before anybody may know which tile this CTA has first: that of its number, if every
/// group has some rows, and no more than one block of them. By the warp that loads b.
template <typename Shape, typename Shared>
class GuessedTile {
  public:
    using State = typename Pipeline<Shape::kNumStages>::State;

    DSO_DEVICE GuessedTile(Shared& shared, const TensorMap* map_b, const Fp8GemmArguments& arguments, int cta)
        : shared_(shared), map_b_(map_b), arguments_(arguments) {
        const RowSchedule& schedule = arguments.schedule;
        if (!Shape::kGuesses || !arguments.b_is_constant || schedule.row_layout != RowLayout::kMasked) return;
        const int num_n_blocks = ceil_div(schedule.n, Shape::BLOCK_N);
        guessed_.b_matrix = cta / num_n_blocks;
        guessed_.first_column = cta % num_n_blocks * Shape::BLOCK_N;
        guessed_.num_columns = Shape::BLOCK_N;
        if (guessed_.b_matrix >= schedule.num_groups) return;
        num_stages_ = min(ceil_div(arguments.k, Shape::BLOCK_K), Shape::kNumStages);
        if (threadIdx.x % 32 == 0) {
            for (int i = 0; i < num_stages_; ++i) ptx::mbarrier_init(&shared.guessed[i], 1);
            ptx::fence_mbarrier_init();
        }
        __syncwarp();
        for (int i = 0; i < num_stages_; ++i) {
            if (ptx::elect_one()) load_step_of_b<Shape>(shared, map_b, arguments, guessed_, i, i, &shared.guessed[i]);
        }
    }

    /// Hands the stages on as the first of `tile`: how many. Where that is another than the guessed one, its bytes take
    /// the place of those.
    DSO_DEVICE int settle(const GemmTile& tile, State& state) {
        const bool is_right = tile.b_matrix == guessed_.b_matrix && tile.first_column == guessed_.first_column &&
                              tile.num_columns == guessed_.num_columns;
        const int num_stages = num_stages_;
        for (int i = 0; i < num_stages; ++i, state.advance()) {
            ptx::mbarrier_wait(&shared_.guessed[i], 0);
            if (!ptx::elect_one()) continue;
            uint64_t* full = &shared_.pipeline.full[i];
            if (is_right) {
                ptx::mbarrier_arrive(full);
            } else {
                load_step_of_b<Shape>(shared_, map_b_, arguments_, tile, i, i, full);
            }
        }
        num_stages_ = 0;
        return num_stages;
    }

    /// Shared memory must outlive the loads, even if there is no tile.
    DSO_DEVICE void drop() const {
        for (int i = 0; i < num_stages_; ++i) ptx::mbarrier_wait(&shared_.guessed[i], 0);
    }

  private:
    Shared& shared_;
    const TensorMap* map_b_;
    const Fp8GemmArguments& arguments_;
    GemmTile guessed_{};
    int num_stages_ = 0;
};

/// The tiles, and b. A constant b may be read at once, where tiles are known beforehand, as dense ones are, or guessed.
template <typename Shape, typename Shared>
DSO_DEVICE void schedule_and_load_b(Shared& shared, const TensorMap* map_b, const Fp8GemmArguments& arguments, int cta,
                                    int num_ctas) {
    GuessedTile<Shape, Shared> guess(shared, map_b, arguments, cta);
    if (!arguments.b_is_constant || arguments.schedule.row_layout != RowLayout::kDense) ptx::grid_dependency_wait();
    RowScheduler<Shape::kMaxRows, Shape::kRowStep, Shape::BLOCK_N, Shape::kColumnStep, Shape::kMostColumns> scheduler(
        arguments.schedule, cta, num_ctas);
    const SplitK split = split_k<Shape>(arguments.k);
    typename Pipeline<Shape::kNumStages>::State state;
    uint32_t num_tiles = 0;
    for (GemmTile tile; scheduler.next(tile);) {
        shared.queue.push(num_tiles, tile);
        for (int k_block = split.first + guess.settle(tile, state); k_block < split.last; ++k_block, state.advance()) {
            shared.pipeline.acquire(state);
            if (ptx::elect_one())
                load_step_of_b<Shape>(shared, map_b, arguments, tile, k_block, state.stage,
                                      &shared.pipeline.full[state.stage]);
        }
    }
    guess.drop();
    shared.queue.push(num_tiles, {});
}

/// a, in boxes of rows, of which a low tile has fewer; or all of a high tile's at once.
template <typename Shape, typename Shared>
DSO_DEVICE void load_a(Shared& shared, const Fp8GemmMaps& maps, const Fp8GemmArguments& arguments) {
    ptx::grid_dependency_wait();
    const SplitK split = split_k<Shape>(arguments.k);
    typename Pipeline<Shape::kNumStages>::State state;
    for (uint32_t num_tiles = 0;; shared.queue.pop(num_tiles)) {
        const GemmTile tile = shared.queue.front(num_tiles);
        if (tile.num_rows == 0) return;
        const bool is_high = arguments.has_high_boxes && tile.num_rows > Shape::kMaxRows - arguments.a_box_rows;
        const TensorMap* map_a = is_high ? &maps.other_a : &maps.a;
        const int box_rows = is_high ? Shape::kMaxRows : arguments.a_box_rows, box_bytes = box_rows * Shape::BLOCK_K;
        const int num_boxes = ceil_div(tile.num_rows, box_rows);
        for (int k_block = split.first; k_block < split.last; ++k_block, state.advance()) {
            shared.pipeline.acquire(state);
            if (!ptx::elect_one()) continue;
            uint64_t* full = &shared.pipeline.full[state.stage];
            uint8_t* a = shared.a_of(state.stage);
            ptx::mbarrier_arrive_expect_tx(full, num_boxes * box_bytes);
#pragma unroll
            for (int i = 0; i < kMaxBoxes; ++i) {
                if (i < num_boxes)
                    ptx::tma_load_3d(a + i * box_bytes, map_a, full, k_block * Shape::BLOCK_K,
                                     tile.first_row + i * box_rows, tile.a_matrix);
            }
        }
    }
}

/// The scales: sfa by TMA where it is MN-major and aligned, else gathered by all lanes; and one float of sfb.
template <typename Shape, bool kGathersSfa, typename Shared>
DSO_DEVICE void load_scales(Shared& shared, const TensorMap* map_sfa, const Fp8GemmArguments& arguments) {
    ptx::grid_dependency_wait();
    const SplitK split = split_k<Shape>(arguments.k);
    const int lane = threadIdx.x % 32;
    typename Pipeline<Shape::kNumStages>::State state;
    for (uint32_t num_tiles = 0;; shared.queue.pop(num_tiles)) {
        const GemmTile tile = shared.queue.front(num_tiles);
        if (tile.num_rows == 0) return;
        const int first_row = tile.first_row / 4 * 4;  // TMA wants runs of float32 to start at multiples of 16 bytes
        const int block = tile.first_column / 128;
        const float* sfb = arguments.sfb + tile.b_matrix * arguments.sfb_stride_matrix +
                           block * arguments.sfb_stride_n + split.first * arguments.sfb_stride_k;
        const int offset = Shape::kScaleRun > Shape::kMaxRows ? tile.first_row - first_row : 0;
        const float* sfa = arguments.sfa + tile.a_matrix * arguments.sfa_stride_matrix +
                           tile.first_row * arguments.sfa_stride_m + split.first * arguments.sfa_stride_k;
        for (int k_block = split.first; k_block < split.last; ++k_block, state.advance()) {
            shared.pipeline.acquire(state);
            if (!kGathersSfa && !ptx::elect_one()) continue;
            uint64_t* full = &shared.pipeline.full[state.stage];
            const int step = k_block - split.first;
            if constexpr (kGathersSfa) {
                for (int row = lane; row < tile.num_rows; row += 32)
                    ptx::cp_async_4(&shared.sfa[state.stage][offset + row],
                                    sfa + row * arguments.sfa_stride_m + step * arguments.sfa_stride_k, true);
            } else {
                ptx::mbarrier_arrive_expect_tx(full, Shape::kScaleRun * static_cast<uint32_t>(sizeof(float)));
                ptx::tma_load_3d(shared.sfa[state.stage], map_sfa, full, first_row, k_block, tile.a_matrix);
            }
            if (!kGathersSfa || lane == 0) {
#pragma unroll
                for (int i = 0; i < Shape::kMostColumns / Shape::BLOCK_N; ++i) {
                    if (i * Shape::BLOCK_N < tile.num_columns)
                        ptx::cp_async_4(&shared.sfb[state.stage][i],
                                        sfb + i * arguments.sfb_stride_n + step * arguments.sfb_stride_k, true);
                }
            }
            ptx::cp_async_mbarrier_arrive(full);
        }
    }
}

/// A loading warp's whole life: number `loader` of kNumLoaderWarps.
template <typename Shape, typename Shared>
DSO_DEVICE void produce_fp8_gemm(Shared& shared, const Fp8GemmMaps& maps, const Fp8GemmArguments& arguments, int loader,
                                 int cta, int num_ctas) {
    if (loader == 0) {
        schedule_and_load_b<Shape>(shared, &maps.b, arguments, cta, num_ctas);
    } else if (loader == 1) {
        load_a<Shape>(shared, maps, arguments);
    } else if (arguments.sfa_by_tma) {
        load_scales<Shape, false>(shared, &maps.sfa, arguments);
    } else {
        load_scales<Shape, true>(shared, &maps.sfa, arguments);
    }
}

inline constexpr int kNumLoaderWarps = 3;

/// By the first loading warp: the barriers of `Shared`, and the descriptors on their way. The other threads wait for it
/// at named barrier 0; it does not wait for them.
template <typename Shape, typename Shared>
DSO_DEVICE void init_fp8_gemm(Shared& shared, const Fp8GemmMaps& maps, const Fp8GemmArguments& arguments,
                              int num_threads) {
    if (threadIdx.x % 32 == 0) {
        ptx::prefetch_tensor_map(&maps.b);
        ptx::prefetch_tensor_map(&maps.a);
        if (arguments.sfa_by_tma) ptx::prefetch_tensor_map(&maps.sfa);
        shared.queue.init(Shape::kNumMathThreads / 32 + kNumLoaderWarps - 1);
        // A stage is full when the bytes of b, of a and of sfa are there, and the copies of sfb or of all lanes.
        shared.pipeline.init(2 + (arguments.sfa_by_tma ? 2 : 32), Shape::kNumStageWarps);
    }
    __syncwarp();
    ptx::named_barrier_arrive(0, num_threads);
}

}  // namespace dso
