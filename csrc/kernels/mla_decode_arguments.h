// The MLA decoding kernels' parameters: plain data that host and device share.
#pragma once

#include "device/divisor.h"
#include "ptx/types.cuh"

namespace dso {

struct MlaDecodeArguments {
    const void* q;  // [b, s_q, heads, 576], strides below; with cu_seqlens_q [s_q, heads, 576]
    int64_t q_stride_b, q_stride_s, q_stride_h;
    const void* kv_cache;  // [num_pages, page_size] rows, strides below
    int64_t page_stride, key_stride;
    const int32_t* block_table;  // [b, max_pages]
    int64_t table_stride;
    const int32_t* cache_seqlens;  // [b]
    const int32_t* cu_seqlens_q;   // [b + 1], or null
    void* out;                     // [b, s_q, heads, 512], strides below; with cu_seqlens_q [s_q, heads, 512]
    int64_t out_stride_b, out_stride_s, out_stride_h;
    float* lse;            // [b, s_q, heads], contiguous; with cu_seqlens_q [s_q, heads]
    float4* partial_sums;  // [tiles of rows, num_parts, groups of 8 columns, tile rows / 16, lanes], of several parts
    float* partial_lse;    // [tiles of rows, CTAs of a cluster, tile rows, num_parts], base 2, likewise
    unsigned long long* counters;                 // [tiles of rows, CTAs of a cluster], of any content, likewise
    int num_pages, max_keys, b, s_q;              // s_q with cu_seqlens_q: of all requests together
    Divisor page_size, num_heads, num_row_tiles;  // tiles of a request's rows, with cu_seqlens_q the most of all's
    int num_parts;                                // of a tile of rows
    int tiles_per_part;  // of keys: with few of them there are fewer parts; 0: there are as many always
    int box_rows;        // rows of a page that TMA loads at a time, a divisor of 64; 0: it cannot
    bool is_causal;
    float scale_log2;   // softmax_scale * log2(e), times value_scale
    float value_scale;  // of the cache; 1 where rows have their own, or none
};

}  // namespace dso
