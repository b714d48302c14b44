// The cache write kernel's parameters: plain data that host and device share.
#pragma once

#include "device/indices.cuh"

namespace dso {

struct MlaCacheWriteArguments {
    const void* kv_c;         // [num_tokens, kv_lora_rank], rows contiguous
    const void* k_pe;         // [num_tokens, rope_dim], rows contiguous, of kv_c's type
    const float* cos_sin;     // [max_position, rope_dim], contiguous
    const void* norm_weight;  // [kv_lora_rank]; unused by the kernel without a norm
    uint8_t* kv_cache;        // [num_pages, page_size] rows
    Indices positions, slots;
    int64_t num_tokens, kv_c_stride, k_pe_stride;
    int64_t max_position;
    int64_t page_stride_bytes, row_stride_bytes;
    uint32_t num_slots, page_size;
    int kv_lora_rank, rope_dim;
    float eps, inverse_rank;
    float amax_floor;        // of the FP8 format of 656 bytes
    float inverse_kv_scale;  // of that of 576
    bool interleaved;
};

}  // namespace dso
