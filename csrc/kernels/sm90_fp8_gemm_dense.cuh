// FP8 GEMM with fine-grained scaling, one dense output of many rows:   d = (a * sfa) @ (b * sfb).T
//
//   a    [m, k]                      e4m3, K-major          TMA, 128-byte swizzle
//   b    [n, k]                      e4m3, K-major          TMA, 128-byte swizzle
//   sfa  [m, ceil(k/128)]            f32, MN-major          TMA
//   sfb  [ceil(n/128), ceil(k/128)]  f32, any strides       cp.async, one float a tile and step
//   d    [m, n]                      bf16                   TMA store
//
// What sm90_fp8_gemm.cuh computes where nothing but TMA is needed and every CTA's tiles are known beforehand: one
// loading warp, and no queue. Measured 2 to 5 % faster there (docs/fp8_gemm.md).
//
// Tile      Fp8GemmShape's; persistent, tiles by rasterize, or by rasterize_wide_late where the last 64 rows or fewer
//           make wide tiles, as in sm90_fp8_gemm.cuh. Both blocks of columns come in one box of b: one warp issues all
//           loads, and with a box more its steps took longer. Tiles that make no full wave may be shared step by step
//           (stream_k.cuh): a warp leaves its sums in global memory, and the same warp of the CTA that has the tile's
//           last step adds them to its own (left_sums.cuh).
// Roles     warpgroups 0 .. kNumMathWarpgroups - 1: 64 rows each: WGMMA, promotion, epilogue.
//           the last warpgroup: its first warp is the producer; it gives its registers to the others.
// Barriers  full[stage]: 1 arrival with the bytes of TMA, 1 of cp.async.   empty[stage]: one arrival of each math warp.
//           named 1 + warpgroup: the epilogue's own 128 threads.
//           left[CTA][warp], in global memory: sums of a shared tile are there.
// Shared    Fp8GemmDenseShared below.
// Numerics  As sm90_fp8_gemm.cuh, and bit for bit the same but for shared tiles: their parts are added in descending
//           order of k, and their bits depend on the number of CTAs.
// Limits    k % 16 == 0, n % 8 == 0, m >= BLOCK_M. TMA fills what is outside with zeros and cuts off the store.
//           Where a last of several steps ends in its first half the second is not multiplied.
// Source    DeepSeek-V3 report, arXiv:2412.19437, section 3.3.   Launched by launch/fp8_gemm.cu.   docs/fp8_gemm.md
#pragma once

#include "device/left_sums.cuh"
#include "device/store_tile.cuh"
#include "device/stream_k.cuh"
#include "kernels/sm90_fp8_gemm.cuh"

namespace dso {

template <typename Shape>
struct Fp8GemmDenseShared {
    alignas(kSwizzleAtomBytes) uint8_t stages[Shape::kNumStages][Shape::kStageBytes];  // a's rows, and then b's
    alignas(kSwizzleAtomBytes) uint8_t panels[Shape::kNumMathWarpgroups][Shape::BLOCK_N / 64][64 * kSwizzleBytes];
    alignas(128) float sfa[Shape::kNumStages][Shape::kMaxRows];  // TMA writes to multiples of 128
    float sfb[Shape::kNumStages][kWideBlocks];
    // Where the tile lies that a stage belongs to: its first row and column in d. To compute it takes divisions, which
    // the producer has time for.
    struct alignas(8) Place {
        int row, column;
    } places[Shape::kNumStages];
    alignas(8) Pipeline<Shape::kNumStages> pipeline;
};

/// Registers a thread, of 65,536 in all. With eight less the math warpgroups compute in each step what they cannot
/// keep.
inline constexpr int kDenseProducerRegisters = 32, kDenseMathRegisters = 160;

/// The output's tiles, and how CTAs share them out.
template <typename Shape>
struct Fp8GemmTiles {
    int num_m_blocks, num_n_blocks;
    bool has_wide;  // the last block of rows, which is low
    StreamKShape shape;

    DSO_DEVICE explicit Fp8GemmTiles(const Fp8GemmArguments& arguments)
        : num_m_blocks(ceil_div(arguments.schedule.m, Shape::kMaxRows)),
          num_n_blocks(ceil_div(arguments.schedule.n, Shape::BLOCK_N)),
          has_wide(arguments.has_wide_tiles),
          shape{has_wide ? grid().num_tiles() : num_m_blocks * num_n_blocks, ceil_div(arguments.k, Shape::BLOCK_K),
                arguments.num_shared_tiles, static_cast<int>(gridDim.x)} {}

    DSO_DEVICE LowEndedGrid grid() const { return {num_m_blocks - 1, num_n_blocks}; }

    DSO_DEVICE Tile place(int tile) const {
        if (!has_wide) return rasterize(tile, num_m_blocks, num_n_blocks);
        // Those that make no full wave are wide ones, if there are as many.
        const int num_left = shape.num_tiles % shape.num_ctas;
        return rasterize_wide_late(tile, grid(), num_left <= grid().num_wide() ? num_left : 0);
    }

    DSO_DEVICE bool is_wide(int first_row) const { return has_wide && first_row >= grid().num_full * Shape::kMaxRows; }
};

/// The producer warp's whole life: keeps the ring filled.
template <typename Shape>
DSO_DEVICE void fp8_gemm_dense_produce(Fp8GemmDenseShared<Shape>& shared, const Fp8GemmMaps& maps,
                                       const Fp8GemmArguments& arguments) {
    constexpr int kBlockBytes = Shape::BLOCK_N * Shape::BLOCK_K;
    const Fp8GemmTiles<Shape> tiles(arguments);
    typename Pipeline<Shape::kNumStages>::State state;

    for (int next = blockIdx.x; next < tiles.shape.num_pieces(); next += gridDim.x) {
        const StreamKPiece piece = stream_k_piece(tiles.shape, next);
        const Tile tile = tiles.place(piece.tile);
        const int first_row = tile.m_block * Shape::kMaxRows, first_column = tile.n_block * Shape::BLOCK_N;
        const bool is_wide = tiles.is_wide(first_row), has_second = is_wide && tile.n_block + 1 < tiles.num_n_blocks;
        const int num_a_bytes = (is_wide ? kLowRows : Shape::kMaxRows) * Shape::BLOCK_K;
        const uint32_t num_bytes = num_a_bytes + (has_second ? 2 : 1) * kBlockBytes + Shape::kMaxRows * 4;
        const TensorMap* map_a = is_wide ? &maps.other_a : &maps.a;
        const TensorMap* map_b = has_second ? &maps.wide_b : &maps.b;
        const float* sfb =
            arguments.sfb + first_column / 128 * arguments.sfb_stride_n + piece.first_step * arguments.sfb_stride_k;
        for (int k_block = piece.first_step; k_block < piece.last_step; ++k_block, state.advance()) {
            shared.pipeline.acquire(state);
            uint64_t* full = &shared.pipeline.full[state.stage];
            if (ptx::elect_one()) {
                const int column = k_block * Shape::BLOCK_K;
                shared.places[state.stage] = {first_row, first_column};
                uint8_t *a = shared.stages[state.stage], *b = a + num_a_bytes;
                ptx::mbarrier_arrive_expect_tx(full, num_bytes);
                ptx::tma_load_3d(a, map_a, full, column, first_row, 0);
                ptx::tma_load_3d(b, map_b, full, column, first_column, 0);
                ptx::tma_load_3d(shared.sfa[state.stage], &maps.sfa, full, first_row, k_block, 0);
                ptx::cp_async_4(&shared.sfb[state.stage][0], sfb, true);
                if (has_second) ptx::cp_async_4(&shared.sfb[state.stage][1], sfb + arguments.sfb_stride_n, true);
                ptx::cp_async_mbarrier_arrive(full);
            }
            sfb += arguments.sfb_stride_k;
        }
    }
}

/// A math warpgroup: a tile's steps, then its epilogue.
template <typename Shape>
class Fp8GemmDenseConsumer {
  public:
    using Shared = Fp8GemmDenseShared<Shape>;

    DSO_DEVICE Fp8GemmDenseConsumer(Shared& shared, const TensorMap* map_d, const Fp8GemmArguments& arguments,
                                    int warpgroup)
        : shared_(shared), map_d_(map_d), arguments_(arguments), warpgroup_(warpgroup) {}

    DSO_DEVICE void run() {
        const Fp8GemmTiles<Shape> tiles(arguments_);
        for (int next = blockIdx.x; next < tiles.shape.num_pieces(); next += gridDim.x) {
            const StreamKPiece piece = stream_k_piece(tiles.shape, next);
            if (piece.first_step == piece.last_step) continue;
            shared_.pipeline.wait(state_);
            const Place place = shared_.places[state_.stage];
            // The same value in the whole warp, and the compiler must know it.
            const int is_wide = __shfl_sync(0xFFFFFFFF, static_cast<int>(tiles.is_wide(place.row)), 0);
            const Part part(warpgroup_, is_wide);
            if (exists(place, part)) {
                compute(piece, place, part, piece.last_step == tiles.shape.num_steps);
            } else {
                pass_over(piece.last_step - piece.first_step);
            }
        }
        if (threadIdx.x % 128 == 0) ptx::tma_store_wait_read<0>();  // shared memory must outlive the last store's reads
    }

  private:
    static constexpr int kNumSums = Shape::BLOCK_N / 2;
    using Place = typename Shared::Place;

    /// A warpgroup's 64 x BLOCK_N of a tile: where they begin, and where a's and b's rows do in a stage.
    struct Part {
        int row, column, b_row;

        DSO_DEVICE Part(int warpgroup, int of_wide)
            : row(of_wide ? 0 : warpgroup * 64),
              column(of_wide ? warpgroup * Shape::BLOCK_N : 0),
              b_row(of_wide ? kLowRows + column : Shape::kMaxRows) {}
    };

    DSO_DEVICE bool exists(const Place& place, const Part& part) const {
        return part.column < Shape::kMostColumns && place.row + part.row < arguments_.schedule.m &&
               place.column + part.column < arguments_.schedule.n;
    }

    DSO_DEVICE void compute(const StreamKPiece& piece, const Place& place, const Part& part, bool has_last_step) {
        scale_row_ = part.row + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
        column_block_ = part.column / Shape::BLOCK_N;
        base_a_ = wgmma_descriptor(shared_.stages[0] + part.row * Shape::BLOCK_K);
        base_b_ = wgmma_descriptor(shared_.stages[0] + part.b_row * Shape::BLOCK_K);
        float sum[kNumSums];
        multiply<true>(sum);
        const bool ends_early = has_last_step && ends_with_half_a_step(arguments_.k);
        int num_left = piece.last_step - piece.first_step - 1;
        for (; num_left > ends_early; --num_left) multiply<false>(sum);
        if (num_left > 0) multiply<false, Shape::BLOCK_K / 2>(sum);
        if (!has_last_step) return sums_of(blockIdx.x).leave(sum);
        for (int i = 1; i <= piece.num_before; ++i) sums_of(blockIdx.x - i).take(sum);
        store_tile_by_tma(
            shared_.panels[warpgroup_], map_d_, sum, 1 + warpgroup_,
            {0, place.row + part.row, place.column + part.column, arguments_.schedule.m, arguments_.schedule.n});
    }

    /// A step; the first gives the sums their values.
    template <bool kIsFirst, int kDepth = Shape::BLOCK_K>
    DSO_DEVICE void multiply(float (&sum)[kNumSums]) {
        const uint64_t a = advance_descriptor(base_a_, state_.stage * Shape::kStageBytes);
        const uint64_t b = advance_descriptor(base_b_, state_.stage * Shape::kStageBytes);
        shared_.pipeline.wait(state_);
        const float sfb = shared_.sfb[state_.stage][column_block_];
        const float upper = shared_.sfa[state_.stage][scale_row_] * sfb;
        const float lower = shared_.sfa[state_.stage][scale_row_ + 8] * sfb;
        float partial[kNumSums];
        start_multiply<Shape::BLOCK_N, kDepth>(partial, a, b);
        finish_multiply(partial);
        release_stage();
        if constexpr (kIsFirst) {
            begin_promotion(sum, partial, upper, lower);
        } else {
            promote(sum, partial, upper, lower);
        }
    }

    /// None of the tile is this warpgroup's.
    DSO_DEVICE void pass_over(int num_steps) {
        for (int i = num_steps; i > 0; --i) {
            shared_.pipeline.wait(state_);
            release_stage();
        }
    }

    DSO_DEVICE void release_stage() {
        __syncwarp();  // every lane has read its scales
        if (threadIdx.x % 32 == 0) shared_.pipeline.release(state_);
        state_.advance();
    }

    /// What this warp of a CTA leaves to that of another, or that one to this.
    DSO_DEVICE LeftSums<kNumSums> sums_of(int cta) const {
        const int warp = cta * Shape::kNumMathThreads / 32 + threadIdx.x / 32;
        return {arguments_.left_sums, arguments_.left, warp};
    }

    Shared& shared_;
    const TensorMap* map_d_;
    const Fp8GemmArguments& arguments_;
    const int warpgroup_;
    int scale_row_, column_block_;  // of this tile, as the descriptors are
    uint64_t base_a_, base_b_;
    typename Pipeline<Shape::kNumStages>::State state_;
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kNumThreads, 1)
    sm90_fp8_gemm_dense_kernel(const __grid_constant__ Fp8GemmMaps maps,
                               const __grid_constant__ Fp8GemmArguments arguments,
                               const __grid_constant__ DirectOutput) {
    using Shared = Fp8GemmDenseShared<Shape>;
    static_assert(sizeof(Shared) <= 232448, "more shared memory than a CTA can have");
    static_assert(Shape::kNumMathThreads * kDenseMathRegisters + 128 * kDenseProducerRegisters <= 65536,
                  "more registers than an SM has");
    auto& shared = ptx::dynamic_shared<Shared>();
    // The same value in the whole warp, and the compiler must know it: roles are branches, not predicates.
    const int warpgroup = __shfl_sync(0xFFFFFFFF, threadIdx.x / 128, 0);

    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&maps.a);
        ptx::prefetch_tensor_map(&maps.b);
        shared.pipeline.init(2, Shape::kNumStageWarps);
    }
    __syncthreads();
    ptx::grid_launch_dependents();

    if (warpgroup == Shape::kNumMathWarpgroups) {
        ptx::setmaxnreg_dec<kDenseProducerRegisters>();
        if (threadIdx.x % 128 / 32 == 0) {
            ptx::grid_dependency_wait();
            fp8_gemm_dense_produce<Shape>(shared, maps, arguments);
        }
    } else {
        ptx::setmaxnreg_inc<kDenseMathRegisters>();
        Fp8GemmDenseConsumer<Shape>(shared, &maps.d, arguments, warpgroup).run();
    }
}

}  // namespace dso
