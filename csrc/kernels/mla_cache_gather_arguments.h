// The parameters of the kernel that reads the latent cache: plain data that host and device share.
#pragma once

#include "ptx/types.cuh"

namespace dso {

struct MlaCacheGatherArguments {
    const uint8_t* kv_cache;     // [num_pages, page_size, d] elements, or FP8 rows
    const int32_t* block_table;  // [b, max_pages], rows contiguous
    const int32_t* cu_seqlens;   // [b + 1]
    void* out;                   // [total, d], contiguous
    int64_t b, total, max_pages, num_pages, page_size;
    int64_t page_stride, row_stride;  // of the cache, in bytes
    int64_t table_stride;
    int d;
    int rows_of_cta;  // at most kGatherMaxRows
    float kv_scale;   // of the FP8 format of 576 bytes
};

}  // namespace dso
