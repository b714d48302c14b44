// The gate kernel's parameters: plain data that host and device share.
#pragma once

#include "ptx/types.cuh"

namespace dso {

struct MoeGateArguments {
    const float* logits;  // [t, num_experts], rows contiguous
    const float* bias;    // [num_experts], or null
    float* topk_weights;  // [t, num_topk], contiguous
    int32_t* topk_idx;    // [t, num_topk], contiguous
    int64_t t, logits_stride;
    int num_experts, num_groups, group_size;
    int num_topk, num_topk_groups;
    bool normalizes;  // the weights, before they are scaled
    float scale;
};

/// Words of shared memory of a token: the choice of each expert, the rank of each group and whether it is kept, and the
/// experts chosen.
DSO_HOST_DEVICE int gate_words(int num_experts, int num_groups, int num_topk) {
    return num_experts + 2 * num_groups + num_topk;
}

}  // namespace dso
