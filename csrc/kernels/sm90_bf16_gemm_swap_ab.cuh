// Grouped bfloat16 GEMM of few rows a group, operands swapped:   d[r].T = b[i] @ a[r].T   for r of group i
//
//   a        [m, k]           bf16, K-major   TMA, 128-byte swizzle
//   b        [groups, n, k]   bf16, K-major   TMA, 128-byte swizzle
//   offsets  [groups + 1]     int32           as device/row_scheduler.cuh reads them
//   d        [m, n]           bf16            4-byte stores from registers, two of which fill sectors
//
// It is a matter of memory: each chosen group's weights are read once, and nothing else is large. So a CTA has most of
// an SM's shared memory as a ring, which is refilled across tiles: reading never stops for an epilogue.
//
// Tile      BLOCK_N = 64 or 128 rows of b, up to kMaxRows rows of a group, steps of 64 of K; a ring of kNumStages.
//           The weights stand on the 64-row side of WGMMA, the tokens on its N side. A tile of half as many rows, or
//           fewer, loads and multiplies half as many.
// Roles     BLOCK_N / 64 warpgroups, 64 rows of b each: WGMMA, epilogue.
//           the last warp finds the tiles and loads them; in the end it clears nobody's rows.
// Barriers  full[stage]: the bytes of TMA.   empty[stage]: one arrival of each math warp.
//           queue: tiles from the loading warp to the others.   named 0: the barriers are initialised.
// Shared    Bf16SwapAbShared below.
// Numerics  float32 sums over k in ascending order of steps, rounded once. They depend on the row, its group's matrix
//           and k alone: not on the tile, nor on the other rows or groups.
// Limits    k % 8 == 0, k >= 8, n % 8 == 0, any m >= 1.
// Source    launched by launch/bf16_gemm.cu.   docs/grouped_gemm.md
#pragma once

#include "device/math.cuh"
#include "device/multiply.cuh"
#include "device/pipeline.cuh"
#include "device/row_scheduler.cuh"
#include "device/tile.cuh"
#include "kernels/bf16_gemm_arguments.h"
#include "ptx/matrix.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"

namespace dso {

/// One line of launch/bf16_gemm_configs.def, for the compiler.
template <int kMaxRows_, int BLOCK_N_, int kNumStages_>
struct Bf16SwapAbShape {
    static constexpr int kMaxRows = kMaxRows_, kNumStages = kNumStages_;
    static constexpr int BLOCK_N = BLOCK_N_, BLOCK_K = 64, kNumNGroups = BLOCK_N / 64;
    static constexpr int kBoxRows = kMaxRows > 8 ? kMaxRows / 2 : 8;  // WGMMA's N side comes in steps of 8
    static constexpr int kNumMathThreads = 128 * kNumNGroups, kNumMathWarps = kNumMathThreads / 32;
    static constexpr int kNumThreads = kNumMathThreads + 32;
    static_assert(BLOCK_N == 64 || BLOCK_N == 128, "a box of b has at most 256 rows");
    static_assert(kMaxRows == 8 || kMaxRows == 16 || kMaxRows == 32 || kMaxRows == 64, "as wide as a WGMMA");
};

template <typename Shape>
struct Bf16SwapAbShared {
    alignas(kSwizzleAtomBytes) uint8_t b[Shape::kNumStages][Shape::BLOCK_N * kSwizzleBytes];
    alignas(kSwizzleAtomBytes) uint8_t a[Shape::kNumStages][Shape::kMaxRows * kSwizzleBytes];
    alignas(8) Pipeline<Shape::kNumStages> pipeline;
    TileQueue queue;
};

template <typename Shape>
class Bf16SwapAbConsumer {
  public:
    using Shared = Bf16SwapAbShared<Shape>;

    DSO_DEVICE Bf16SwapAbConsumer(Shared& shared, const Bf16GemmArguments& arguments)
        : shared_(shared),
          arguments_(arguments),
          n_group_(__shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0)),
          thread_(threadIdx.x % 128),
          num_steps_(ceil_div(arguments.k, Shape::BLOCK_K)),
          a_(shared.a[0]),
          b_(shared.b[0] + n_group_ * 64 * kSwizzleBytes) {}

    DSO_DEVICE void run() {
        for (;; shared_.queue.pop(num_tiles_)) {
            const GemmTile& tile = shared_.queue.front(num_tiles_);
            if (tile.num_rows == 0) return;
            if constexpr (Shape::kBoxRows < Shape::kMaxRows) {
                if (tile.num_rows > Shape::kBoxRows) {
                    compute<Shape::kMaxRows>(tile);
                    continue;
                }
            }
            compute<Shape::kBoxRows>(tile);
        }
    }

  private:
    static constexpr int kNumInFlight = 1;  // steps that the tensor core still has when the next is started

    template <int kTokens>
    DSO_DEVICE void compute(const GemmTile& tile) {
        float sum[kTokens / 2];
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) sum[i] = 0.f;

        for (int step = 0; step < num_steps_; ++step) {
            shared_.pipeline.wait(state_);
            start_adding<kTokens>(sum, b_.get(), a_.get());
            a_.advance(state_.stage);
            b_.advance(state_.stage);
            state_.advance();
            ptx::wgmma_wait<kNumInFlight>();
            if (step >= kNumInFlight) release_oldest();
        }
        finish_multiply(sum);
        for (int i = min(num_steps_, kNumInFlight); i > 0; --i) release_oldest();
        store<kTokens>(sum, tile);
    }

    /// The stage that has been multiplied from for longest.
    DSO_DEVICE void release_oldest() {
        __syncwarp();  // every lane has waited for its part of the product
        if (thread_ % 32 == 0) shared_.pipeline.release(oldest_);
        oldest_.advance();
    }

    /// A lane has two tokens of a row of b; transposed, eight by eight, it has two neighbours of a row of d.
    template <int kTokens>
    DSO_DEVICE void store(const float (&sum)[kTokens / 2], const GemmTile& tile) {
        const int thread = ptx::compute_here(thread_), warp = thread / 32, lane = thread % 32;
        const int column = tile.first_column + n_group_ * 64 + warp * 16 + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
            const int token = 8 * j + lane / 4;
            uint16_t* row = arguments_.d + (tile.first_row + token) * arguments_.d_stride;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float* x = &sum[4 * j + 2 * half];
                const uint32_t pair = ptx::transpose_8x8(ptx::pack_bf16x2(x[0], x[1]));
                if (token < tile.num_rows && column + 8 * half < arguments_.schedule.n)
                    *reinterpret_cast<uint32_t*>(row + column + 8 * half) = pair;
            }
        }
    }

    Shared& shared_;
    const Bf16GemmArguments& arguments_;
    const int n_group_, thread_, num_steps_;
    RingDescriptor<Shape::kNumStages, sizeof(Shared::a[0])> a_;
    RingDescriptor<Shape::kNumStages, sizeof(Shared::b[0])> b_;
    PipelineState<Shape::kNumStages> state_, oldest_;
    uint32_t num_tiles_ = 0;
};

/// Zeros in the rows of d before `first` and from `end` on, which are nobody's.
DSO_DEVICE void clear_unowned_rows(const Bf16GemmArguments& arguments, int first, int end) {
    const int num_rows = first + arguments.schedule.m - end;
    for (int i = blockIdx.x; i < num_rows; i += gridDim.x) {
        auto* row = reinterpret_cast<uint4*>(arguments.d + (i < first ? i : i - first + end) * arguments.d_stride);
        for (int chunk = threadIdx.x % 32; chunk < arguments.schedule.n / 8; chunk += 32) row[chunk] = {};
    }
}

/// The loading warp's whole life. All lanes run the loop, though one does the work: what is uniform in the warp is
/// computed by the uniform datapath, and where lanes part that cannot be used.
template <typename Shape>
DSO_DEVICE void produce_bf16_gemm(Bf16SwapAbShared<Shape>& shared, const Bf16GemmMaps& maps,
                                  const Bf16GemmArguments& arguments) {
    if (threadIdx.x % 32 == 0) {
        ptx::prefetch_tensor_map(&maps.b);
        ptx::prefetch_tensor_map(&maps.a);
    }
    __syncwarp();
    ptx::grid_dependency_wait();
    RowScheduler<Shape::kMaxRows, 8, Shape::BLOCK_N> scheduler(arguments.schedule, blockIdx.x, gridDim.x);
    const int num_steps = ceil_div(arguments.k, Shape::BLOCK_K);
    constexpr uint32_t kWeightBytes = Shape::BLOCK_N * kSwizzleBytes, kBoxBytes = Shape::kBoxRows * kSwizzleBytes;
    typename Pipeline<Shape::kNumStages>::State state;
    uint32_t num_tiles = 0;
    const auto push = [&](const GemmTile& tile) {
        if (num_tiles == 0) ptx::named_barrier_sync(0, Shape::kNumThreads);  // initialised while the first was found
        shared.queue.push(num_tiles, tile);
    };
    for (GemmTile tile; scheduler.next(tile);) {
        push(tile);
        const bool two_boxes = Shape::kBoxRows < Shape::kMaxRows && tile.num_rows > Shape::kBoxRows;
        // What a shuffle from lane 0 gives is known to be uniform, and in the loop nothing is left to find out.
        const int first_row = __shfl_sync(0xFFFFFFFF, tile.first_row, 0);
        const int row_of_b = __shfl_sync(0xFFFFFFFF, tile.first_column, 0);
        const int b_matrix = __shfl_sync(0xFFFFFFFF, tile.b_matrix, 0);
        const uint32_t num_bytes = kWeightBytes + (two_boxes ? 2 : 1) * kBoxBytes;
        for (int step = 0; step < num_steps; ++step, state.advance()) {
            shared.pipeline.acquire(state);
            if (!ptx::elect_one()) continue;
            uint64_t* full = &shared.pipeline.full[state.stage];
            uint8_t* a = shared.a[state.stage];
            const int column = step * Shape::BLOCK_K;
            ptx::mbarrier_arrive_expect_tx(full, num_bytes);
            ptx::tma_load_3d(shared.b[state.stage], &maps.b, full, column, row_of_b, b_matrix);
            ptx::tma_load_3d(a, &maps.a, full, column, first_row, 0);
            if (two_boxes) ptx::tma_load_3d(a + kBoxBytes, &maps.a, full, column, first_row + Shape::kBoxRows, 0);
        }
    }
    push({});
    if (arguments.clears_unowned)
        clear_unowned_rows(arguments, scheduler.first_owned_row(), scheduler.owned_rows_end());
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::kNumThreads, 1)
    sm90_bf16_gemm_swap_ab_kernel(const __grid_constant__ Bf16GemmMaps maps,
                                  const __grid_constant__ Bf16GemmArguments arguments) {
    using Shared = Bf16SwapAbShared<Shape>;
    static_assert(sizeof(Shared) <= 232448, "more shared memory than a CTA can have");
    auto& shared = ptx::dynamic_shared<Shared>();
    const bool is_producer = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0) == Shape::kNumMathWarps;

    ptx::grid_launch_dependents();
    if (is_producer) {
        produce_bf16_gemm<Shape>(shared, maps, arguments);
    } else {
        if (threadIdx.x == 0) {
            shared.queue.init(Shape::kNumMathWarps);
            shared.pipeline.init(1, Shape::kNumMathWarps);
        }
        __syncwarp();
        ptx::named_barrier_sync(0, Shape::kNumThreads);
        Bf16SwapAbConsumer<Shape>(shared, arguments).run();
    }
}

}  // namespace dso
