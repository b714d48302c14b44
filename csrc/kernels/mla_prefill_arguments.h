// The MLA prefill kernel's parameters: plain data that host and device share.
#pragma once

#include "ptx/types.cuh"

namespace dso {

struct MlaPrefillArguments {
    const int32_t* cu_seqlens_q;  // [b + 1], of any values
    const int32_t* cu_seqlens_k;  // [b + 1], likewise
    void* out;                    // [total_q, heads, 128], contiguous
    float* lse;                   // [total_q, heads], contiguous
    int32_t* num_taken;           // of tiles beyond each CTA's first; 0 at the start
    int b, total_q, total_k, num_heads;
    bool is_causal;
    float scale_log2;  // softmax_scale * log2(e)
};

}  // namespace dso
