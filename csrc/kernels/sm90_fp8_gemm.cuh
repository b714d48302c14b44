// FP8 GEMM with fine-grained scaling:   d = (a * sfa) @ (b * sfb).T   (+ d)
//
//   a    [groups, m, k]                      e4m3, K-major          TMA, 128-byte swizzle
//   b    [groups, n, k]                      e4m3, K-major          TMA, 128-byte swizzle
//   sfa  [groups, m, ceil(k/128)]            f32, any strides       TMA where MN-major and aligned, else cp.async
//   sfb  [groups, ceil(n/128), ceil(k/128)]  f32, any strides       cp.async, one float a tile and step
//   d    [groups, m, n]                      bf16 or f32            TMA store, or straight from registers
//
// Tile      64 * kNumMGroups rows of a or fewer, BLOCK_N of b, steps of 128 of K; a ring of kNumStages. Persistent,
//           tiles in a fixed order or as CTAs draw them (row_scheduler.cuh). BLOCK_N divides 128, so one sfb serves a
//           tile's whole step. With three warpgroups, what a group has above a multiple of their rows, if it is 64 rows
//           or fewer, comes in wide tiles of two blocks of columns, a warpgroup each: the second's rows of b lie where
//           the other rows of a would.
// Split     Two CTAs of a cluster may share a tile of 128 x 128, each with a half of K. Each adds up and stores 64 of
//           its rows, and copies its sums of the others to the other CTA. In a cluster a CTA has one tile only.
// Roles     math warpgroups: 64 rows of a each: WGMMA, promotion, epilogue. Or two of them have the same rows and take
//           steps in turn: alone, one would leave the tensor core idle while it promotes. The second leaves its sums.
//           the last warpgroup: three of its warps load (fp8_gemm_producer.cuh); it gives its registers to the others.
// Barriers  full[stage]: the bytes of TMA and the arrivals of cp.async.   empty[stage]: one arrival of each warp that
//           multiplies from there.   queue: tiles from the first loading warp to all others.
//           named 0: the barriers are initialised.   1 and 2: the second group's sums are there, and taken.
//           Only if split: barrier.cluster says that all CTAs run, all_received that the other's sums are here, named
//           1 that all warps have read them.
// Shared    Fp8GemmShared below.
// Numerics  WGMMA accumulates 128 of K in its own precision; float32 registers take that times sfa * sfb (promote.cuh).
//           The order of additions depends on k, on whether steps are taken in turn and on the split, not on the rest
//           of the tile, the CTA or the other rows.
// Limits    k % 16 == 0, n % 8 == 0, any m >= 1. TMA fills what is outside with zeros. Where a last of several steps
//           ends in its first half the second is not multiplied, unless steps are taken in turn or split.
// Source    DeepSeek-V3 report, arXiv:2412.19437, section 3.3.   Launched by launch/fp8_gemm.cu.   docs/fp8_gemm.md
#pragma once

#include "device/multiply.cuh"
#include "device/promote.cuh"
#include "device/store.cuh"
#include "device/tile.cuh"
#include "device/tile_rows.cuh"
#include "kernels/fp8_gemm_producer.cuh"

namespace dso {

/// One line of launch/fp8_gemm_configs.def, for the compiler.
template <int kNumMGroups_, int BLOCK_N_, int kNumKGroups_, int kNumStages_, int kMostSplits = 1>
struct Fp8GemmShape {
    static constexpr int kNumMGroups = kNumMGroups_, kNumKGroups = kNumKGroups_, kNumStages = kNumStages_;
    static constexpr int kNumMathWarpgroups = kNumMGroups * kNumKGroups;
    static constexpr int kMaxRows = 64 * kNumMGroups, kRowStep = 64, BLOCK_N = BLOCK_N_, BLOCK_K = 128;
    static constexpr int kColumnStep = BLOCK_N;
    static constexpr bool kHasWideTiles = kNumMGroups == 3 && BLOCK_N == 128;
    static constexpr int kMostColumns = kHasWideTiles ? kWideBlocks * BLOCK_N : BLOCK_N;
    static constexpr int kStageBytes = (kMaxRows + BLOCK_N) * BLOCK_K;  // of a and b
    static constexpr int kNumMathThreads = 128 * kNumMathWarpgroups, kNumThreads = kNumMathThreads + 128;
    static constexpr int kNumStageWarps = 4 * kNumMGroups;  // a stage is one k group's
    static constexpr int kScaleRun = kMaxRows + 4;  // floats of sfa that a step loads: a run starts at a multiple of 4
    static constexpr int kNumPanels = ceil_div(BLOCK_N, 64);  // of 64 columns: what TMA stores
    static constexpr bool kCanSplit = kMostSplits > 1, kGuesses = false;

    // Registers a thread, of 65,536 in all: what the producer needs, and as many as the math warpgroups can have.
    static constexpr int kProducerRegisters = 56;
    static constexpr int kMathRegisters = kNumMathWarpgroups == 3 ? 152 : 224;

    static_assert(128 % BLOCK_N == 0, "one sfb a tile: BLOCK_N must divide the scale block");
    static_assert(!kCanSplit || (kMostSplits == 2 && kNumMGroups == 2 && BLOCK_N == 128), "64 rows for each CTA");
    static_assert(kNumMathWarpgroups <= 3,
                  "more math warpgroups leave too few registers for 64 x 128 sums and partials");
    static_assert(kNumKGroups == 1 || (kNumKGroups == 2 && kNumMGroups == 1), "one group leaves sums to one other");
};

template <typename Shape>
struct Fp8GemmShared {
    alignas(kSwizzleAtomBytes) uint8_t stages[Shape::kNumStages][Shape::kStageBytes];  // a's rows, and then b's
    union {
        // A warp's 16 rows of the output, 64 columns each. (TMA's swizzle goes by the address: whole atoms.)
        alignas(kSwizzleAtomBytes) uint8_t panels[4 * Shape::kNumMGroups][Shape::kNumPanels][16 * kSwizzleBytes];
        float received[4][Shape::kCanSplit ? Shape::BLOCK_N / 2 : 1][32];  // of the other CTA, as its lanes had them
    };
    float left_sums[Shape::kNumKGroups > 1 ? Shape::BLOCK_N / 2 : 1][Shape::kNumKGroups > 1 ? 128 : 1];
    alignas(128) float sfa[Shape::kNumStages][align_up(Shape::kScaleRun, 32)];  // TMA writes to multiples of 128
    float sfb[Shape::kNumStages][Shape::kMostColumns / Shape::BLOCK_N];
    alignas(8) Pipeline<Shape::kNumStages> pipeline;
    TileQueue queue;
    uint64_t guessed[Shape::kGuesses ? Shape::kNumStages : 1];  // b of the first tile (GuessedTile)
    uint64_t all_received;

    DSO_DEVICE uint8_t* a_of(uint32_t stage) { return stages[stage]; }
    DSO_DEVICE uint8_t* b_of(uint32_t stage, const GemmTile& tile) {
        return stages[stage] + (is_wide(tile) ? kLowRows : Shape::kMaxRows) * Shape::BLOCK_K;
    }

    DSO_DEVICE static bool is_wide(const GemmTile& tile) {
        return Shape::kHasWideTiles && tile.num_columns > Shape::BLOCK_N;
    }
};

template <typename Shape>
class Fp8GemmConsumer {
  public:
    using Shared = Fp8GemmShared<Shape>;

    DSO_DEVICE Fp8GemmConsumer(Shared& shared, const TensorMap* map_d, const Fp8GemmArguments& arguments,
                               const DirectOutput& output, int warp)
        : shared_(shared),
          map_d_(map_d),
          arguments_(arguments),
          output_(output),
          warp_(warp % (4 * Shape::kNumMGroups)),
          k_group_(warp / (4 * Shape::kNumMGroups)),
          lane_(threadIdx.x % 32),
          steps_(k_group_) {
        state_.stage = k_group_;
    }

    DSO_DEVICE void run() {
        for (;; shared_.queue.pop(num_tiles_)) {
            const GemmTile& tile = shared_.queue.front(num_tiles_);
            if (tile.num_rows == 0) break;
            const SplitK split = split_k<Shape>(arguments_.k);
            const int num_steps = steps_.of_tile(split.last - split.first);
            if (has_part(tile) || is_split()) {
                compute(tile, num_steps);
            } else {
                pass_over(num_steps);
            }
        }
        if (has_left_sums_) ptx::named_barrier_sync(kSumsTaken, Shape::kNumMathThreads);
        if (lane_ == 0) ptx::tma_store_wait_read<0>();  // shared memory must outlive the last store's reads
        if (is_split()) ptx::cluster_wait();            // and the copies from it
    }

  private:
    static constexpr int kNumSums = Shape::BLOCK_N / 2;
    static constexpr uint32_t kSumsLeft = 1, kSumsTaken = 2;  // named barriers

    using Ring = RingDescriptor<Shape::kNumStages, Shape::kStageBytes, Shape::kNumKGroups>;

    /// What this warpgroup multiplies, from the stage on that comes next.
    struct Operands {
        Ring a, b;
        int scale_row;     // the thread's upper one in the run of sfa
        int column_block;  // of those that have an sfb
    };

    DSO_DEVICE static bool is_wide(const GemmTile& tile) { return Shared::is_wide(tile); }

    /// The warp's 16 rows of the tile, and its BLOCK_N columns of d.
    DSO_DEVICE int row_of_warp(const GemmTile& tile) const { return (is_wide(tile) ? warp_ % 4 : warp_) * 16; }
    DSO_DEVICE int first_column(const GemmTile& tile) const {
        return tile.first_column + (is_wide(tile) ? warp_ / 4 * Shape::BLOCK_N : 0);
    }

    DSO_DEVICE bool has_part(const GemmTile& tile) const {
        return is_wide(tile) ? warp_ / 4 * Shape::BLOCK_N < tile.num_columns : warp_ / 4 * 64 < tile.num_rows;
    }

    DSO_DEVICE Operands operands(const GemmTile& tile) const {
        const int column_block = is_wide(tile) ? warp_ / 4 : 0;
        const uint8_t* a = shared_.a_of(state_.stage) + (is_wide(tile) ? 0 : warp_ / 4 * 64) * Shape::BLOCK_K;
        const uint8_t* b = shared_.b_of(state_.stage, tile) + column_block * Shape::BLOCK_N * Shape::BLOCK_K;
        return {Ring(a), Ring(b), row_of_warp(tile) + lane_ / 4 + tile.first_row % 4, column_block};
    }

    /// None of the tile is this warpgroup's.
    DSO_DEVICE void pass_over(int num_steps) {
        for (int i = num_steps; i > 0; --i, state_.advance()) {
            shared_.pipeline.wait(state_);
            release_stage();
        }
    }

    DSO_DEVICE void compute(const GemmTile& tile, int num_steps) {
        float sum[kNumSums];
        Operands x = operands(tile);
        // Asked for long before it is needed: whether this lane's row in the epilogue is the tile's own.
        const bool is_own = is_owned(arguments_.schedule, tile, row_of_warp(tile) + lane_ % 16);

        if (Shape::kNumKGroups == 1 || num_steps > 0) {
            multiply<true>(sum, x);
        } else {
#pragma unroll
            for (float& x : sum) x = 0.f;
        }
        int num_left = num_steps - 1;
        if constexpr (Shape::kNumKGroups == 1) {
            const bool ends_early = ends_with_half_a_step(arguments_.k) && !is_split();
            for (; num_left > ends_early; --num_left) multiply<false>(sum, x);
            if (num_left > 0) multiply<false, Shape::BLOCK_K / 2>(sum, x);
        } else {
            for (; num_left > 0; --num_left) multiply<false>(sum, x);
        }

        if constexpr (Shape::kNumKGroups > 1) {
            if (k_group_ != 0) return leave(sum);
            take(sum);
        }
        if constexpr (Shape::kCanSplit) {
            if (is_split()) {
                if (warp_ / 4 != static_cast<int>(ptx::cluster_rank())) return send(sum);
                add_received(sum);
            }
        }
        if (output_.is_bf16 && !output_.accumulate) {
            store_bf16(sum, tile, is_own);
        } else {
            store_direct(sum, tile);
        }
    }

    /// A step; the first gives the sums their values.
    template <bool kIsFirst, int kDepth = Shape::BLOCK_K>
    DSO_DEVICE void multiply(float (&sum)[kNumSums], Operands& x) {
        shared_.pipeline.wait(state_);
        const float sfb = shared_.sfb[state_.stage][x.column_block];
        const float* sfa = &shared_.sfa[state_.stage][x.scale_row];
        const float upper = sfa[0] * sfb, lower = sfa[8] * sfb;
        float partial[kNumSums];
        start_multiply<Shape::BLOCK_N, kDepth>(partial, x.a.get(), x.b.get());
        finish_multiply(partial);
        release_stage();
        if constexpr (kIsFirst) {
            begin_promotion(sum, partial, upper, lower);
        } else {
            promote(sum, partial, upper, lower);
        }
        x.a.advance(state_.stage);
        x.b.advance(state_.stage);
        state_.advance();
    }

    /// To the first group, which adds these to its own.
    DSO_DEVICE void leave(const float (&sum)[kNumSums]) {
        if (has_left_sums_) ptx::named_barrier_sync(kSumsTaken, Shape::kNumMathThreads);  // those of the tile before
#pragma unroll
        for (int i = 0; i < kNumSums; ++i) shared_.left_sums[i][threadIdx.x % 128] = sum[i];
        ptx::named_barrier_arrive(kSumsLeft, Shape::kNumMathThreads);
        has_left_sums_ = true;
    }

    DSO_DEVICE void take(float (&sum)[kNumSums]) {
        ptx::named_barrier_sync(kSumsLeft, Shape::kNumMathThreads);
#pragma unroll
        for (int i = 0; i < kNumSums; ++i) sum[i] += shared_.left_sums[i][threadIdx.x % 128];
        ptx::named_barrier_arrive(kSumsTaken, Shape::kNumMathThreads);
    }

    DSO_DEVICE static bool is_split() { return Shape::kCanSplit && ptx::cluster_size() > 1; }

    /// To the CTA that owns the rows, by way of the warp's rows of a, which only the warp itself reads.
    DSO_DEVICE void send(const float (&sum)[kNumSums]) {
        constexpr int kRowsBytes = 16 * Shape::BLOCK_K;
        constexpr int kSums = kRowsBytes / (32 * sizeof(float));  // of a lane, that a stage has room for
        static_assert(Shape::kNumStages * kSums >= kNumSums, "the sums fit into the stages");
        const auto room = [&](int stage) {
            return reinterpret_cast<float*>(shared_.stages[stage] + warp_ * kRowsBytes);
        };
        // One by one: four at a time would have to lie in neighbouring registers, and then in the banks of partials.
#pragma unroll
        for (int i = 0; i < kNumSums; ++i) room(i / kSums)[i % kSums * 32 + lane_] = sum[i];
        ptx::fence_proxy_async_shared();
        __syncwarp();
        ptx::cluster_wait();  // the other CTA runs, and its barrier is initialised
        if (lane_ < kNumSums / kSums)
            ptx::copy_to_cluster_async(ptx::cluster_address(shared_.received[warp_ % 4][lane_ * kSums], warp_ / 4),
                                       room(lane_), kRowsBytes, ptx::cluster_address(&shared_.all_received, warp_ / 4));
        __syncwarp();
        ptx::cluster_arrive();
    }

    /// Of two summands it does not matter which comes first.
    DSO_DEVICE void add_received(float (&sum)[kNumSums]) {
        ptx::cluster_wait();
        ptx::mbarrier_wait(&shared_.all_received, 0);
        __syncwarp();
        ptx::cluster_arrive();  // what was sent to this CTA has left the other
#pragma unroll
        for (int i = 0; i < kNumSums; ++i) sum[i] += shared_.received[warp_ % 4][i][lane_];
        ptx::named_barrier_sync(1, 128);  // the panels take their place
    }

    DSO_DEVICE void release_stage() {
        __syncwarp();  // every lane has read its scales
        if (lane_ == 0) shared_.pipeline.release(state_);
    }

    /// A warp's 16 rows through its panels. By TMA, while the next tile is computed, where all of them are the tile's
    /// own or there is nothing else that they could be; row by row where they are not.
    DSO_DEVICE void store_bf16(const float (&sum)[kNumSums], const GemmTile& tile, bool is_own) {
        const int lane = ptx::compute_here(lane_), row = row_of_warp(tile);
        if (lane == 0) ptx::tma_store_wait_read<0>();  // the tile before has left the panels
        __syncwarp();
        auto& panels = shared_.panels[warp_];
#pragma unroll
        for (int j = 0; j < Shape::BLOCK_N / 16; ++j) {
            const float* x = &sum[8 * j];
            ptx::stmatrix_x4(panels[j / 4] + swizzled_offset(lane % 16, j % 4 * 2 + lane / 16),
                             ptx::pack_bf16x2(x[0], x[1]), ptx::pack_bf16x2(x[2], x[3]), ptx::pack_bf16x2(x[4], x[5]),
                             ptx::pack_bf16x2(x[6], x[7]));
        }
        const bool whole = arguments_.schedule.row_layout == RowLayout::kDense || __all_sync(0xFFFFFFFF, is_own);
        if (Shape::BLOCK_N >= 64 && whole) {
            ptx::fence_proxy_async_shared();
            __syncwarp();
            if (lane == 0) store_by_tma(tile, row);
        } else {
            __syncwarp();
            copy_rows(tile, row, lane);
        }
    }

    DSO_DEVICE void store_by_tma(const GemmTile& tile, int row) {
#pragma unroll
        for (int panel = 0; panel < Shape::kNumPanels; ++panel) {
            const int column = first_column(tile) + panel * 64;
            if (column < arguments_.schedule.n && row < tile.num_rows)
                ptx::tma_store_3d(map_d_, shared_.panels[warp_][panel], column, tile.first_row + row, tile.a_matrix);
        }
        ptx::tma_store_commit();
    }

    /// Eight lanes store 128 neighbouring bytes.
    DSO_DEVICE void copy_rows(const GemmTile& tile, int row, int lane) {
#pragma unroll 1
        for (int i = lane; i < 16 * Shape::BLOCK_N / 8; i += 32) {
            const int r = i / (Shape::BLOCK_N / 8), chunk = i % (Shape::BLOCK_N / 8);
            const int column = first_column(tile) + 8 * chunk;
            if (column >= arguments_.schedule.n || !is_owned(arguments_.schedule, tile, row + r)) continue;
            const uint8_t* value = shared_.panels[warp_][chunk / 8] + swizzled_offset(r, chunk % 8);
            auto* d = static_cast<uint16_t*>(output_.d) + row_offset(output_, tile, row + r) + column;
            *reinterpret_cast<uint4*>(d) = *reinterpret_cast<const uint4*>(value);
        }
    }

    DSO_DEVICE void store_direct(const float (&sum)[kNumSums], const GemmTile& tile) {
        const int lane = ptx::compute_here(lane_);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row_of_warp(tile) + lane / 4 + 8 * half;
            if (!is_owned(arguments_.schedule, tile, row)) continue;
            const int64_t first = row_offset(output_, tile, row);
#pragma unroll
            for (int j = 0; j < Shape::BLOCK_N / 8; ++j) {
                const int column = first_column(tile) + 8 * j + 2 * (lane % 4);
                const float* x = &sum[4 * j + 2 * half];
                if (column >= arguments_.schedule.n) continue;
                store_element(output_, first + column, x[0]);
                store_element(output_, first + column + 1, x[1]);
            }
        }
    }

    Shared& shared_;
    const TensorMap* map_d_;
    const Fp8GemmArguments& arguments_;
    const DirectOutput& output_;
    const int warp_, k_group_, lane_;  // the warp's place among those of its k group
    PipelineState<Shape::kNumStages, Shape::kNumKGroups> state_;
    StepsInTurn<Shape::kNumKGroups> steps_;
    uint32_t num_tiles_ = 0;
    bool has_left_sums_ = false;
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kNumThreads, 1)
    sm90_fp8_gemm_kernel(const __grid_constant__ Fp8GemmMaps maps, const __grid_constant__ Fp8GemmArguments arguments,
                         const __grid_constant__ DirectOutput output) {
    using Shared = Fp8GemmShared<Shape>;
    static_assert(sizeof(Shared) <= 232448, "more shared memory than a CTA can have");
    auto& shared = ptx::dynamic_shared<Shared>();
    // The same value in the whole warp, and the compiler must know it: roles are branches, not predicates.
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);
    constexpr int kProducerWarp = Shape::kNumMathThreads / 32;

    const int size = Shape::kCanSplit ? static_cast<int>(ptx::cluster_size()) : 1;
    if (warp == kProducerWarp) {
        if (Shape::kCanSplit && threadIdx.x % 32 == 0) ptx::mbarrier_init(&shared.all_received, 1);
        init_fp8_gemm<Shape>(shared, maps, arguments, Shape::kNumThreads);
        if (Shape::kCanSplit && threadIdx.x % 32 == 0)
            ptx::mbarrier_arrive_expect_tx(&shared.all_received, sizeof(shared.received));
    } else {
        ptx::named_barrier_sync(0, Shape::kNumThreads);
    }
    if (size > 1) ptx::cluster_arrive();
    ptx::grid_launch_dependents();

    if (warp >= kProducerWarp) {
        ptx::setmaxnreg_dec<Shape::kProducerRegisters>();
        if (warp < kProducerWarp + kNumLoaderWarps)
            produce_fp8_gemm<Shape>(shared, maps, arguments, warp - kProducerWarp, blockIdx.x / size, gridDim.x / size);
    } else {
        ptx::setmaxnreg_inc<Shape::kMathRegisters>();
        Fp8GemmConsumer<Shape>(shared, &maps.d, arguments, output, warp).run();
    }
}

}  // namespace dso
