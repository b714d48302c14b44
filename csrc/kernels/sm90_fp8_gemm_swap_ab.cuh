// FP8 GEMM with fine-grained scaling, operands swapped:   d.T = (b * sfb) @ (a * sfa).T   (+ d.T)
//
//   a    [groups, m, k]                      e4m3, K-major          TMA, 128-byte swizzle
//   b    [groups, n, k]                      e4m3, K-major          TMA, 128-byte swizzle
//   sfa  [groups, m, ceil(k/128)]            f32, any strides       TMA where MN-major and aligned, else cp.async
//   sfb  [groups, ceil(n/128), ceil(k/128)]  f32, any strides       cp.async, one float a tile and step
//   d    [groups, m, n]                      bf16 or f32            16-byte stores through shared memory, or direct
//
// The weights b stand on the 64-row side of WGMMA and the tokens a on its N side, which comes in steps of 8: a few
// tokens cost few of the tensor core's columns, and most of a stage's bytes are weights.
//
// Tile      BLOCK_N = 64 or 128 rows of b, up to kMaxRows rows of a, steps of 128 of K; a ring of kNumStages.
//           A tile of half as many rows of a, or fewer, multiplies half as many. Among a mask's last tiles some may
//           have 64 rows of b instead of 128 (row_scheduler.cuh): one warpgroup's.
// Split     A cluster of s CTAs shares a tile, each with an s-th of K, and kNumKGroups warpgroups share the steps of a
//           CTA in turn. Each copies its sums to their owners' shared memory, but for its own, and those add them up in
//           order. In a cluster a CTA has one tile only.
// Roles     kNumKGroups times BLOCK_N / 64 warpgroups, 64 rows of b each: WGMMA, promotion, epilogue.
//           the last three warps load (fp8_gemm_producer.cuh).
// Barriers  full[stage]: the bytes of TMA and the arrivals of cp.async.   empty[stage]: one arrival of each warp that
//           multiplies from there.   queue: tiles from the first loading warp to all others.
//           named 0: the barriers are initialised.   1 + 64-row block: math threads, in the epilogue.
//           guessed[stage]: bytes of b that were asked for before the first tile was known (GuessedTile).
//           Only if split: barrier.cluster says that all CTAs run, all_received that the others' sums are here.
// Shared    Fp8SwapAbShared below.
// Numerics  As sm90_fp8_gemm.cuh, and unsplit, of one group along k, bit for bit the same: the order of additions then
//           depends on k alone. Otherwise it depends on the groups and the number of parts, too.
// Limits    k % 16 == 0, n % 8 == 0, any m >= 1.
// Source    DeepSeek-V3 report, arXiv:2412.19437, section 3.3.   Launched by launch/fp8_gemm.cu.   docs/fp8_gemm.md
#pragma once

#include "device/math.cuh"
#include "device/multiply.cuh"
#include "device/promote.cuh"
#include "device/store.cuh"
#include "device/tile.cuh"
#include "device/tile_rows.cuh"
#include "kernels/fp8_gemm_producer.cuh"

namespace dso {

/// One line of launch/fp8_gemm_configs.def, for the compiler.
template <int kMaxRows_, int BLOCK_N_, int kNumKGroups_, int kNumStages_, int kCtasPerSm_>
struct Fp8SwapAbShape {
    static constexpr int kMaxRows = kMaxRows_, kNumKGroups = kNumKGroups_, kNumStages = kNumStages_;
    static constexpr int kRowStep = 8, kColumnStep = 64, kCtasPerSm = kCtasPerSm_;
    static constexpr int BLOCK_N = BLOCK_N_, kMostColumns = BLOCK_N, BLOCK_K = 128, kNumNGroups = BLOCK_N / 64;
    static constexpr int kNumMathThreads = 128 * kNumKGroups * kNumNGroups;
    static constexpr int kNumThreads = kNumMathThreads + 32 * kNumLoaderWarps;
    static constexpr int kScaleRun = kMaxRows;              // floats of sfa that a step loads
    static constexpr int kNumStageWarps = 4 * kNumNGroups;  // a stage is one group's
    static constexpr int kSumPitch = BLOCK_N + 4;           // floats of a token's sums in shared memory
    static constexpr bool kCanSplit = true, kGuesses = BLOCK_N == 128;
    static_assert(BLOCK_N == 64 || BLOCK_N == 128, "one sfb a tile: BLOCK_N must divide the scale block");
};

template <typename Shape>
struct Fp8SwapAbShared {
    alignas(kSwizzleAtomBytes) uint8_t b[Shape::kNumStages][Shape::BLOCK_N * Shape::BLOCK_K];
    alignas(kSwizzleAtomBytes) uint8_t a[Shape::kNumStages][Shape::kMaxRows * Shape::BLOCK_K];
    union {
        alignas(128) uint8_t panels[Shape::kNumNGroups][Shape::kMaxRows * kSwizzleBytes];  // 64 bfloat16 a token
        float received[Shape::kNumKGroups * Shape::kMaxRows * Shape::kSumPitch];
    };
    alignas(128) float sfa[Shape::kNumStages][align_up(Shape::kMaxRows, 32)];  // TMA writes to multiples of 128
    float sfb[Shape::kNumStages][1];
    alignas(8) Pipeline<Shape::kNumStages> pipeline;
    TileQueue queue;
    uint64_t guessed[Shape::kGuesses ? Shape::kNumStages : 1];  // b of the first tile (GuessedTile)
    uint64_t all_received;

    DSO_DEVICE uint8_t* a_of(uint32_t stage) { return a[stage]; }
    DSO_DEVICE uint8_t* b_of(uint32_t stage, const GemmTile&) { return b[stage]; }
};

template <typename Shape>
class Fp8SwapAbConsumer {
  public:
    using Shared = Fp8SwapAbShared<Shape>;

    DSO_DEVICE Fp8SwapAbConsumer(Shared& shared, const Fp8GemmArguments& arguments, const DirectOutput& output)
        : shared_(shared),
          arguments_(arguments),
          output_(output),
          n_group_(__shfl_sync(0xFFFFFFFF, threadIdx.x / 128 % Shape::kNumNGroups, 0)),
          k_group_(__shfl_sync(0xFFFFFFFF, threadIdx.x / 128 / Shape::kNumNGroups, 0)),
          thread_(threadIdx.x % 128),
          a_(shared.a[k_group_]),
          b_(shared.b[k_group_] + n_group_ * 64 * Shape::BLOCK_K),
          steps_(k_group_) {
        state_.stage = k_group_;
    }

    DSO_DEVICE void run() {
        for (;; shared_.queue.pop(num_tiles_)) {
            const GemmTile& tile = shared_.queue.front(num_tiles_);
            if (tile.num_rows == 0) return;
            if (n_group_ * 64 >= tile.num_columns) {
                pass_over();
            } else if constexpr (Shape::kMaxRows >= 32) {
                constexpr int kHalf = Shape::kMaxRows / 2;
                const int width = tile.num_rows > kHalf ? Shape::kMaxRows : kHalf;
                if (width == kHalf) {
                    compute<kHalf>(tile);
                } else {
                    compute<Shape::kMaxRows>(tile);
                }
            } else {
                compute<Shape::kMaxRows>(tile);
            }
        }
    }

  private:
    /// None of the tile's columns are this warpgroup's.
    DSO_DEVICE void pass_over() {
        const SplitK split = split_k<Shape>(arguments_.k);
        for (int i = steps_.of_tile(split.last - split.first); i > 0; --i, advance()) {
            shared_.pipeline.wait(state_);
            release_stage();
        }
    }

    template <int kTokens>
    DSO_DEVICE void compute(const GemmTile& tile) {
        float sum[kTokens / 2], partial[kTokens / 2];
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) sum[i] = 0.f;

        const SplitK split = split_k<Shape>(arguments_.k);
        for (int i = steps_.of_tile(split.last - split.first); i > 0; --i, advance()) {
            shared_.pipeline.wait(state_);
            start_multiply<kTokens>(partial, b_.get(), a_.get());

            const float sfb = shared_.sfb[state_.stage][0];
            const auto* sfa = reinterpret_cast<const float2*>(shared_.sfa[state_.stage]) + thread_ % 4;
            if constexpr (kTokens <= 64) {
                float scales[kTokens / 4];  // read, and used, while the tensor core works
#pragma unroll
                for (int j = 0; j < kTokens / 8; ++j) {
                    scales[2 * j] = sfa[4 * j].x * sfb;
                    scales[2 * j + 1] = sfa[4 * j].y * sfb;
                }
                ptx::keep_in_order(scales);
                finish_multiply(partial);
                release_stage();
                promote_columns(sum, partial, [&](int j) { return float2{scales[2 * j], scales[2 * j + 1]}; });
            } else {  // more than there are registers for
                finish_multiply(partial);
                promote_columns(sum, partial, [&](int j) { return float2{sfa[4 * j].x * sfb, sfa[4 * j].y * sfb}; });
                ptx::fence_proxy_async_shared();  // the last scales may be on their way still
                release_stage();
            }
        }

        if (Shape::kNumKGroups > 1 || ptx::cluster_size() > 1) {
            reduce_and_store<kTokens>(sum, tile);
        } else if (output_.is_bf16 && !output_.accumulate) {
            store_bf16<kTokens>(sum, tile);
        } else {
            store_direct<kTokens>(sum, tile);
        }
    }

    DSO_DEVICE void advance() {
        a_.advance(state_.stage);
        b_.advance(state_.stage);
        state_.advance();
    }

    DSO_DEVICE void release_stage() {
        __syncwarp();
        if (thread_ % 32 == 0) shared_.pipeline.release(state_);
    }

    /// Transposed through shared memory, so that a thread stores eight neighbours of a row of d.
    template <int kTokens>
    DSO_DEVICE void store_bf16(const float (&sum)[kTokens / 2], const GemmTile& tile) {
        const int thread = ptx::compute_here(thread_);
        const uint32_t warp = thread / 32, lane = thread % 32, barrier = 1 + n_group_;
        uint8_t* panel = shared_.panels[n_group_];
        ptx::named_barrier_sync(barrier, 128);  // the previous tile has left the panel
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
            ptx::stmatrix_x2_trans(panel + swizzled_offset(8 * j + lane % 8, 2 * warp + lane / 8 % 2),
                                   ptx::pack_bf16x2(sum[4 * j + 0], sum[4 * j + 1]),
                                   ptx::pack_bf16x2(sum[4 * j + 2], sum[4 * j + 3]));
        }
        ptx::named_barrier_sync(barrier, 128);
        const int first_column = tile.first_column + n_group_ * 64;
#pragma unroll
        for (int i = thread; i < kTokens * 8; i += 128) {
            const int token = i / 8, chunk = i % 8, column = first_column + 8 * chunk;
            if (column >= arguments_.schedule.n || !is_owned(arguments_.schedule, tile, token)) continue;
            const uint4 value = *reinterpret_cast<const uint4*>(panel + swizzled_offset(token, chunk));
            *reinterpret_cast<uint4*>(static_cast<uint16_t*>(output_.d) + row_offset(output_, tile, token) + column) =
                value;
        }
    }

    template <int kTokens>
    DSO_DEVICE void store_direct(const float (&sum)[kTokens / 2], const GemmTile& tile) {
        const int thread = ptx::compute_here(thread_), warp = thread / 32, lane = thread % 32;
        const int column = tile.first_column + n_group_ * 64 + warp * 16 + lane / 4;
#pragma unroll
        for (int j = 0; j < kTokens / 4; ++j) {
            const int token = 8 * (j / 2) + 2 * (lane % 4) + j % 2;
            if (!is_owned(arguments_.schedule, tile, token)) continue;
            const int64_t first = row_offset(output_, tile, token);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (column + 8 * half < arguments_.schedule.n)
                    store_element(output_, first + column + 8 * half, sum[4 * (j / 2) + 2 * half + j % 2]);
            }
        }
    }

    /// Adds up the sums of all groups and CTAs that share a tile. Each CTA owns kTokens / size neighbouring tokens of
    /// it.
    template <int kTokens>
    DSO_DEVICE void reduce_and_store(const float (&sum)[kTokens / 2], const GemmTile& tile) {
        constexpr int kPitch = Shape::kSumPitch, kChunks = Shape::BLOCK_N / 8;
        const int size = ptx::cluster_size(), rank = ptx::cluster_rank();
        const int num_parts = size * Shape::kNumKGroups, num_owned = kTokens >> (__ffs(size) - 1);
        const auto rows_of = [&](int owner) { return min(max(tile.num_rows - owner * num_owned, 0), num_owned); };
        float* received = shared_.received;  // [part][owned token][column]
        // In a cluster they go through the stages, which nobody needs any more: [k group][token][column]. The CTA's own
        // stay there: what is copied must go to another CTA.
        static_assert(Shape::kNumKGroups * kTokens * kPitch * sizeof(float) <= sizeof(shared_.b) + sizeof(shared_.a),
                      "the sums fit into the stages");
        float* sent = size > 1 ? reinterpret_cast<float*>(shared_.b) : received;

        ptx::named_barrier_sync(1, Shape::kNumMathThreads);  // all have read the stages, or the sums of the tile before
        write_sums<kTokens>(sent + k_group_ * kTokens * kPitch, sum);
        if (size > 1) ptx::fence_proxy_async_shared();
        ptx::named_barrier_sync(1, Shape::kNumMathThreads);
        if (size > 1) {
            ptx::cluster_wait();  // all CTAs run, and their barriers are initialised
            constexpr uint32_t kRowBytes = kPitch * sizeof(float);
            if (threadIdx.x == 0)
                ptx::mbarrier_arrive_expect_tx(&shared_.all_received,
                                               (num_parts - Shape::kNumKGroups) * rows_of(rank) * kRowBytes);
            if (threadIdx.x < num_parts) {
                const int owner = threadIdx.x % size, k_group = threadIdx.x / size;
                const int part = rank * Shape::kNumKGroups + k_group;
                if (owner != rank && rows_of(owner) > 0)
                    ptx::copy_to_cluster_async(ptx::cluster_address(received + part * num_owned * kPitch, owner),
                                               sent + (k_group * kTokens + owner * num_owned) * kPitch,
                                               rows_of(owner) * kRowBytes,
                                               ptx::cluster_address(&shared_.all_received, owner));
            }
            ptx::mbarrier_wait(&shared_.all_received, 0);
            __syncwarp();
            ptx::cluster_arrive();  // what was sent to this CTA has left the others
        }

        for (int i = threadIdx.x; i < rows_of(rank) * kChunks; i += Shape::kNumMathThreads) {
            const int owned = i / kChunks, chunk = i % kChunks, token = rank * num_owned + owned;
            const int column = tile.first_column + 8 * chunk;
            if (column >= arguments_.schedule.n || !is_owned(arguments_.schedule, tile, token)) continue;
            float total[8] = {};
            for (int part = 0; part < num_parts; ++part) {
                const float* row = part / Shape::kNumKGroups == rank
                                       ? sent + (part % Shape::kNumKGroups * kTokens + token) * kPitch
                                       : received + (part * num_owned + owned) * kPitch;
                const auto* x = reinterpret_cast<const float4*>(row) + 2 * chunk;
                add_quad(total, x[0]);
                add_quad(total + 4, x[1]);
            }
            store_octet(output_, row_offset(output_, tile, token) + column, total);
        }
        if (size > 1) ptx::cluster_wait();  // shared memory must outlive the copies from it
    }

    /// This warpgroup's 64 columns of `rows`, a token each. With that pitch no two lanes write to the same bank.
    template <int kTokens>
    DSO_DEVICE void write_sums(float* rows, const float (&sum)[kTokens / 2]) {
        const int warp = thread_ / 32, lane = thread_ % 32;
        float* first = rows + 2 * (lane % 4) * Shape::kSumPitch + n_group_ * 64 + warp * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) first[(i / 4 * 8 + i % 2) * Shape::kSumPitch + i / 2 % 2 * 8] = sum[i];
    }

    Shared& shared_;
    const Fp8GemmArguments& arguments_;
    const DirectOutput& output_;
    const int n_group_, k_group_, thread_;
    RingDescriptor<Shape::kNumStages, sizeof(Shared::a[0]), Shape::kNumKGroups> a_;
    RingDescriptor<Shape::kNumStages, sizeof(Shared::b[0]), Shape::kNumKGroups> b_;
    PipelineState<Shape::kNumStages, Shape::kNumKGroups> state_;
    StepsInTurn<Shape::kNumKGroups> steps_;
    uint32_t num_tiles_ = 0;
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::kNumThreads, Shape::kCtasPerSm)
    sm90_fp8_gemm_swap_ab_kernel(const __grid_constant__ Fp8GemmMaps maps,
                                 const __grid_constant__ Fp8GemmArguments arguments,
                                 const __grid_constant__ DirectOutput output) {
    using Shared = Fp8SwapAbShared<Shape>;
    static_assert(sizeof(Shared) <= 232448, "more shared memory than a CTA can have");
    auto& shared = ptx::dynamic_shared<Shared>();
    const int warp = __shfl_sync(0xFFFFFFFF, threadIdx.x / 32, 0);
    constexpr int kProducerWarp = Shape::kNumMathThreads / 32;

    const int size = ptx::cluster_size();
    if (warp == kProducerWarp) {
        if (threadIdx.x % 32 == 0) ptx::mbarrier_init(&shared.all_received, 1);
        init_fp8_gemm<Shape>(shared, maps, arguments, Shape::kNumThreads);
    } else {
        ptx::named_barrier_sync(0, Shape::kNumThreads);
    }
    if (size > 1) ptx::cluster_arrive();
    ptx::grid_launch_dependents();

    if (warp >= kProducerWarp) {
        produce_fp8_gemm<Shape>(shared, maps, arguments, warp - kProducerWarp, blockIdx.x / size, gridDim.x / size);
    } else {
        Fp8SwapAbConsumer<Shape>(shared, arguments, output).run();
    }
}

}  // namespace dso
