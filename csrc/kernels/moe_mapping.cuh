// The experts' rows: pair p of a token and an expert e goes to row   row_idx[p] = offsets[e] + pairs of e before p,
//                    offsets[e + 1] = offsets[e] + pairs of e, rounded up to a multiple of the alignment
//
//   topk_idx              [t, num_topk]      int32, contiguous; a pair without an expert here has no row
//   row_idx               [t, num_topk]      int32, -1 where there is none
//   token_idx, m_indices  [num_rows]         int32: the token of a row, and its expert; -1 in padding
//   offsets               [num_experts + 1]  int32
//
// Work      One cluster, of one CTA where pairs are few. A warp has a run of neighbouring pairs, and counts them by
//           expert in counters of its own. Sums over the CTA's runs, and over the CTAs, which send their sums to each
//           other, say where a run's pairs of an expert begin. Then the warps go through their runs once more, 32 pairs
//           at a time: lanes find those of the same expert, and stand in their order. All rows that are nobody's are
//           filled up in between.
// Order     A pair's row follows from the pairs before it, never from who comes first: the same on every run. The only
//           atomics are a warp's own counts.
// Barriers  barrier.cluster says that all CTAs run, all_received that the others' sums are here. Nobody ends before the
//           others have what it sent.
// Shared    counters of every expert for each warp and CTA: 47 KB for 256 experts, 32 warps and 8 CTAs
// Limits    fewer than 2^31 pairs and rows; 4096 experts.   Launched by launch/moe_mapping.cu
#pragma once

#include "kernels/moe_mapping_arguments.h"
#include "ptx/cluster.cuh"
#include "ptx/shared_memory.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"

namespace dso {

inline constexpr int kMappingWarps = 32;
inline constexpr int kPairsAtOnce = 4;  // of a lane: loaded before the first is used
inline constexpr int kNoExpert = -1;

struct MappingShared {
    uint64_t all_received;
    int sums_of_warps[kMappingWarps];
};

/// The sum of `x` over the CTA's threads before this one, which are warps of threadIdx.x.
DSO_DEVICE int sum_over_threads_before(int x, int (&sums_of_warps)[kMappingWarps]) {
    const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
    int sum = x;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFF, sum, distance);
        if (lane >= distance) sum += other;
    }
    if (lane == 31) sums_of_warps[warp] = sum;
    __syncthreads();
    int before = lane < warp ? sums_of_warps[lane] : 0;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) before += __shfl_xor_sync(0xFFFFFFFF, before, offset);
    return before + sum - x;
}

/// Calls `function(pair, expert)` for the pairs from `first` on, with all lanes together; lanes past the end, and those
/// whose pair has no expert here, with kNoExpert.
template <typename Function>
DSO_DEVICE void for_pairs_of_run(const MoeMappingArguments& arguments, int64_t first, int64_t end, Function function) {
    const int lane = static_cast<int>(threadIdx.x);
    for (int64_t batch = first; batch < end; batch += 32 * kPairsAtOnce) {
        int experts[kPairsAtOnce];
#pragma unroll
        for (int i = 0; i < kPairsAtOnce; ++i) {
            const int64_t pair = batch + 32 * i + lane;
            experts[i] = pair < end ? arguments.topk_idx[pair] : kNoExpert;
        }
#pragma unroll
        for (int i = 0; i < kPairsAtOnce; ++i) {
            if (batch + 32 * i >= end) break;
            const bool is_here = experts[i] >= 0 && experts[i] < arguments.num_experts;
            function(batch + 32 * i + lane, is_here ? experts[i] : kNoExpert);
        }
    }
}

__global__ void __launch_bounds__(32 * kMappingWarps, 1)
    moe_mapping_kernel(const __grid_constant__ MoeMappingArguments arguments) {
    const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
    const int num_warps = static_cast<int>(blockDim.y), num_threads = 32 * num_warps, thread = 32 * warp + lane;
    const int size = static_cast<int>(ptx::cluster_size()), rank = static_cast<int>(ptx::cluster_rank());
    const int num_experts = arguments.num_experts, pitch = mapping_pitch(num_experts);
    auto& shared = ptx::static_shared<MappingShared>();
    int* counts_of_runs = &ptx::dynamic_shared<int>();         // [warp][expert], later those of the runs before
    int* counts_of_ctas = counts_of_runs + num_warps * pitch;  // [rank][expert]
    int* first_rows = counts_of_ctas + size * pitch;           // of this CTA's pairs
    int* last_rows = first_rows + pitch;                       // of all pairs, and one more
    int* next_rows = last_rows + pitch;                        // of the expert after
    int* counts = counts_of_runs + warp * pitch;

    if (size > 1 && thread == 0) {
        ptx::mbarrier_init(&shared.all_received, 1);
        ptx::fence_mbarrier_init();
    }
    for (int expert = lane; expert < num_experts; expert += 32) counts[expert] = 0;
    __syncwarp();
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    const int64_t first = (int64_t{rank} * num_warps + warp) * arguments.pairs_of_run;
    const int64_t end = min(first + arguments.pairs_of_run, arguments.num_pairs);
    for_pairs_of_run(arguments, first, end, [&](int64_t, int expert) {
        if (expert != kNoExpert) atomicAdd(&counts[expert], 1);
    });
    __syncthreads();
    if (size > 1) ptx::cluster_arrive();

    for (int expert = thread; expert < num_experts; expert += num_threads) {
        int count = 0;
#pragma unroll 8
        for (int run = 0; run < num_warps; ++run) {
            int& of_run = counts_of_runs[run * pitch + expert];
            const int before = count;
            count += of_run;
            of_run = before;
        }
        counts_of_ctas[rank * pitch + expert] = count;
    }
    if (size > 1) {
        ptx::fence_proxy_async_shared();
        ptx::cluster_wait();  // until all CTAs run, and their barriers are initialised
        __syncthreads();
        const uint32_t num_bytes = pitch * sizeof(int);
        if (thread == 0) ptx::mbarrier_arrive_expect_tx(&shared.all_received, (size - 1) * num_bytes);
        int* sent = counts_of_ctas + rank * pitch;
        if (thread < size && thread != rank)
            ptx::copy_to_cluster_async(ptx::cluster_address(sent, thread), sent, num_bytes,
                                       ptx::cluster_address(&shared.all_received, thread));
        ptx::mbarrier_wait(&shared.all_received, 0);
        __syncwarp();
        ptx::cluster_arrive();  // what was sent to this CTA has left the others
    } else {
        __syncthreads();
    }

    const int experts_of_thread = ceil_div(num_experts, num_threads);
    const int first_expert = thread * experts_of_thread,
              end_expert = min(first_expert + experts_of_thread, num_experts);
    const auto aligned = [&](int count) {
        return (count / arguments.alignment + (count % arguments.alignment != 0)) * arguments.alignment;
    };
    int num_rows = 0;
    for (int expert = first_expert; expert < end_expert; ++expert) {
        int before = 0, count = 0;
        for (int cta = 0; cta < size; ++cta) {
            if (cta == rank) before = count;
            count += counts_of_ctas[cta * pitch + expert];
        }
        first_rows[expert] = before;
        last_rows[expert] = count;
        num_rows += aligned(count);
    }
    int row_of_expert = sum_over_threads_before(num_rows, shared.sums_of_warps);
    for (int expert = first_expert; expert < end_expert; ++expert) {
        const int count = last_rows[expert];
        first_rows[expert] += row_of_expert;
        last_rows[expert] = row_of_expert + count;
        if (rank == 0) arguments.offsets[expert] = row_of_expert;
        next_rows[expert] = row_of_expert += aligned(count);
    }
    __syncthreads();
    const int end_of_rows = next_rows[num_experts - 1];
    if (rank == 0 && thread == 0) arguments.offsets[num_experts] = end_of_rows;

    const auto leave_empty = [&](int64_t row) { arguments.token_idx[row] = arguments.m_indices[row] = -1; };
    for (int expert = rank * num_warps + warp; expert < num_experts; expert += size * num_warps) {
        for (int64_t row = last_rows[expert] + lane; row < next_rows[expert]; row += 32) leave_empty(row);
    }
    for (int64_t row = int64_t{end_of_rows} + rank * num_threads + thread; row < arguments.num_rows;
         row += size * num_threads)
        leave_empty(row);

    for_pairs_of_run(arguments, first, end, [&](int64_t pair, int expert) {
        const uint32_t alike = __match_any_sync(0xFFFFFFFF, expert);
        const int num_before = __popc(alike & ((1u << lane) - 1));
        int row = -1;
        if (expert != kNoExpert) {
            row = first_rows[expert] + counts[expert] + num_before;
            arguments.token_idx[row] = static_cast<int>(pair) / arguments.num_topk;
            arguments.m_indices[row] = expert;
        }
        if (pair < end) arguments.row_idx[pair] = row;
        __syncwarp();
        if (expert != kNoExpert && num_before == 0) counts[expert] += __popc(alike);
        __syncwarp();
    });
    if (size > 1) ptx::cluster_wait();  // shared memory must outlive the copies from it
}

}  // namespace dso
