// The gate of a mixture of experts: choice = score(logits) + bias,   topk_idx = the num_topk best choices among those
// of the num_topk_groups best groups,   topk_weights = their scores / their sum * scale;   score = sigmoid or softmax
//
//   logits                  [t, experts]   f32, rows contiguous
//   bias                    [experts]      f32, or none
//   topk_weights, topk_idx  [t, num_topk]  f32, int32, contiguous
//
// Work      A warp a token, alone in its CTA where tokens are few. Lane i has the experts i, i + 32 and so on: their
//           choices in shared memory, the best of them in registers. The warp takes the best of those num_topk times,
//           and the lane that had it looks for its next. Group i's score is made by lane i.
// Order     That of unsigned integers that floats are turned into: NaN is above all, and of equal choices, and of equal
//           groups, the one with the lower index is better. Experts outside the kept groups count as -inf, and so
//           compete with a choice of -inf.
// Numerics  float32: expf and division are correctly rounded or nearly so, as in torch.
// Limits    any t; experts + 2 groups + num_topk at most 12288.
// Source    DeepSeek-V3 report, arXiv:2412.19437, section 2.1.2.   Launched by launch/moe_gate.cu
#pragma once

#include "kernels/moe_gate_arguments.h"
#include "ptx/shared_memory.cuh"
#include "ptx/sync.cuh"

namespace dso {

inline constexpr int kGateThreads = 128;
inline constexpr int kExpertsAtOnce = 8;  // of a lane: loaded before the first is used
inline constexpr uint32_t kAllLanes = 0xFFFFFFFF;
inline constexpr uint32_t kTaken = 0;  // below the rank of every float

/// Unsigned integers in the order of floats. (No sum of a score and a bias is -0.)
DSO_DEVICE uint32_t rank_of(float x) {
    if (x != x) return 0xFFFFFFFF;
    const uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

template <bool kSoftmax>
struct GateScore {
    float max, sum;  // of a softmax

    DSO_DEVICE float operator()(float logit) const {
        return kSoftmax ? __fdiv_rn(expf(logit - max), sum) : __fdiv_rn(1.f, 1.f + expf(-logit));
    }
};

DSO_DEVICE float sum_over_warp(float x) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
    return x;
}

template <bool kSoftmax>
DSO_DEVICE GateScore<kSoftmax> score_of_row(const float* logits, int num_experts) {
    if constexpr (!kSoftmax) return {};
    float max = -INFINITY, sum = 0.f;
    for (int expert = threadIdx.x; expert < num_experts; expert += 32) max = fmaxf(max, logits[expert]);
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) max = fmaxf(max, __shfl_xor_sync(kAllLanes, max, offset));
    for (int expert = threadIdx.x; expert < num_experts; expert += 32) sum += expf(logits[expert] - max);
    return {max, sum_over_warp(sum)};
}

/// The sum of a group's two best choices, or its best; NaN, if it has one. Lanes start at different places, for their
/// groups may begin in the same bank.
template <bool kSoftmax>
DSO_DEVICE float score_of_group(const float* choices, int group_size) {
    float best = -INFINITY, second = -INFINITY;
    bool has_nan = false;
    for (int i = 0, place = threadIdx.x % group_size; i < group_size; ++i) {
        const float x = choices[place];
        second = fmaxf(second, fminf(best, x));
        best = fmaxf(best, x);
        has_nan |= x != x;
        if (++place == group_size) place = 0;
    }
    return has_nan ? NAN : kSoftmax || group_size == 1 ? best : best + second;
}

template <bool kSoftmax>
__global__ void __launch_bounds__(kGateThreads, 1) moe_gate_kernel(const __grid_constant__ MoeGateArguments arguments) {
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (token >= arguments.t) return;
    const int lane = static_cast<int>(threadIdx.x), num_experts = arguments.num_experts;
    const int num_groups = arguments.num_groups, num_topk = arguments.num_topk;
    uint32_t* ranks = &ptx::dynamic_shared<uint32_t>() + threadIdx.y * gate_words(num_experts, num_groups, num_topk);
    auto* choices = reinterpret_cast<float*>(ranks);  // first these, then their ranks in the same place
    uint32_t* group_ranks = ranks + num_experts;
    uint32_t* is_kept = group_ranks + num_groups;
    uint32_t* chosen = is_kept + num_groups;

    const float* logits = arguments.logits + token * arguments.logits_stride;
    const auto score = score_of_row<kSoftmax>(logits, num_experts);
    for (int first = lane; first < num_experts; first += 32 * kExpertsAtOnce) {
        float x[kExpertsAtOnce], biases[kExpertsAtOnce];
#pragma unroll
        for (int i = 0; i < kExpertsAtOnce; ++i) {
            const int expert = first + 32 * i;
            x[i] = expert < num_experts ? logits[expert] : 0.f;
            biases[i] = arguments.bias && expert < num_experts ? arguments.bias[expert] : 0.f;
        }
#pragma unroll
        for (int i = 0; i < kExpertsAtOnce; ++i) {
            if (first + 32 * i < num_experts) choices[first + 32 * i] = score(x[i]) + biases[i];
        }
    }
    __syncwarp();

    const bool keeps_all = arguments.num_topk_groups == num_groups;
    if (!keeps_all) {
        for (int group = lane; group < num_groups; group += 32)
            group_ranks[group] =
                rank_of(score_of_group<kSoftmax>(choices + group * arguments.group_size, arguments.group_size));
        __syncwarp();
        for (int group = lane; group < num_groups; group += 32) {
            const uint32_t rank = group_ranks[group];
            int num_better = 0;
            for (int other = 0; other < num_groups; ++other)
                num_better += group_ranks[other] > rank || (group_ranks[other] == rank && other < group);
            is_kept[group] = num_better < arguments.num_topk_groups;
        }
        __syncwarp();
    }

    uint32_t best = kTaken;
    int best_expert = lane;
    const auto consider = [&](int expert, uint32_t rank) {
        if (rank > best) best = rank, best_expert = expert;
    };
    for (int expert = lane; expert < num_experts; expert += 32) {
        const bool kept = keeps_all || is_kept[expert / arguments.group_size];
        ranks[expert] = rank_of(kept ? choices[expert] : -INFINITY);
        consider(expert, ranks[expert]);
    }
    for (int i = 0; i < num_topk; ++i) {
        const uint32_t top = __reduce_max_sync(kAllLanes, best);
        const int winner = static_cast<int>(
            __reduce_min_sync(kAllLanes, best == top ? static_cast<uint32_t>(best_expert) : 0xFFFFFFFF));
        if (lane == 0) chosen[i] = static_cast<uint32_t>(winner);
        if (winner % 32 != lane) continue;
        ranks[winner] = kTaken;
        best = kTaken;
        for (int expert = lane; expert < num_experts; expert += 32) consider(expert, ranks[expert]);
    }
    __syncwarp();

    float sum = 0.f;
    for (int i = lane; i < num_topk; i += 32) sum += score(logits[chosen[i]]);
    sum = sum_over_warp(sum);
    for (int i = lane; i < num_topk; i += 32) {
        float weight = score(logits[chosen[i]]);
        if (arguments.normalizes) weight = __fdiv_rn(weight, sum + 1e-20f);
        arguments.topk_weights[token * num_topk + i] = weight * arguments.scale;
        arguments.topk_idx[token * num_topk + i] = static_cast<int32_t>(chosen[i]);
    }
}

}  // namespace dso
