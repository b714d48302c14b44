// The C interface of libdeepseek_kernels: raw pointers, strides, a stream; a status and a message back.
//
// Neither CUDA nor torch headers are needed to include this file. Every function returns a dso_status; the sentence
// behind anything but DSO_OK is dso_last_error(). All are safe to call from many threads, and during graph capture.
// Strides are in elements. Launches go to the calling thread's current device, which must own the pointers.
#pragma once

#include <stdint.h>

#define DSO_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

typedef enum dso_status {
    DSO_OK = 0,
    DSO_INVALID = 1,     // an argument is out of contract
    DSO_CUDA_ERROR = 2,  // CUDA refused
    DSO_NO_KERNEL = 3    // this build, or this GPU, has no kernel for it
} dso_status;

typedef enum dso_dtype { DSO_BF16 = 0, DSO_F16 = 1, DSO_F32 = 2 } dso_dtype;

typedef void* dso_stream;  // a cudaStream_t; 0 is the legacy default stream

// The calling thread's last failure, as a sentence.
DSO_API const char* dso_last_error(void);

// Whether the kernels were compiled in, and whether `device` is a GPU that they were compiled for (0 or 1).
DSO_API int dso_built_with_cuda(void);
DSO_API int dso_has_kernels_for(int device);

// d = (a * sfa) @ (b * sfb).T, or d += it.
typedef struct dso_fp8_gemm {
    const void* a;                         // [m, k] e4m3, rows contiguous, 16-byte aligned
    const float* sfa;                      // [m, ceil(k / 128)]
    const void* b;                         // [n, k] e4m3, rows contiguous, 16-byte aligned
    const float* sfb;                      // [ceil(n / 128), ceil(k / 128)]
    void* d;                               // [m, n], rows contiguous, 16-byte aligned
    int64_t m, n, k;                       // n a multiple of 8, k of 16
    int64_t a_stride, b_stride, d_stride;  // between rows
    int64_t sfa_stride_m, sfa_stride_k;
    int64_t sfb_stride_n, sfb_stride_k;
    dso_dtype d_dtype;    // DSO_BF16 or DSO_F32
    int accumulate;       // 0: overwrite d; 1: add to it
    int batch_invariant;  // 1: a row's bits depend on that row, b and k alone
} dso_fp8_gemm;

DSO_API dso_status dso_fp8_gemm_nt(const dso_fp8_gemm* gemm, dso_stream stream);

// What computes a shape: a compiled tile, and the number of CTAs that share one along k.
typedef struct dso_fp8_gemm_plan {
    int config;  // its place in fp8_gemm_configs.def
    int block_m, block_n, num_stages, swaps_operands, shared_bytes;
    int num_splits;
} dso_fp8_gemm_plan;

// The plan that dso_fp8_gemm_nt follows on a GPU of `num_sms`.
DSO_API dso_status dso_plan_fp8_gemm(int64_t m, int64_t n, int64_t k, int batch_invariant, int num_sms,
                                     dso_fp8_gemm_plan* plan);

// dso_fp8_gemm_nt by a plan of one's own: any config, and 1, 2, 4 or 8 splits where it swaps operands.
DSO_API dso_status dso_fp8_gemm_nt_by_plan(const dso_fp8_gemm* gemm, int config, int num_splits, dso_stream stream);

// Which rows of a meet which matrix of b.
typedef enum dso_row_layout {
    DSO_ROWS_MASKED = 1,   // a and d are num_groups matrices; the first layout[i] rows of matrix i meet matrix i of b
    DSO_ROWS_OFFSETS = 2,  // rows layout[i] to layout[i + 1] meet matrix i; an offset counts as the largest so far
    DSO_ROWS_CONTIGUOUS =
        3  // row r meets matrix layout[r], constant within segments of 128 but for indices of no group
} dso_row_layout;

// dso_fp8_gemm_nt for rows of several groups, each with a matrix of b of its own. Nobody's rows are not written.
typedef struct dso_m_grouped_fp8_gemm {
    dso_fp8_gemm gemm;                                         // of one matrix of a, of b and of d each
    int64_t a_stride_group, sfa_stride_group, d_stride_group;  // only for DSO_ROWS_MASKED
    int64_t b_stride_group, sfb_stride_group;
    int64_t num_groups;
    dso_row_layout row_layout;
    const int32_t* layout;
    int64_t expected_m;  // a guess of the rows of a group, at least 1
    int clear_unowned;   // 1: nobody's rows become zeros
} dso_m_grouped_fp8_gemm;

DSO_API dso_status dso_m_grouped_fp8_gemm_nt(const dso_m_grouped_fp8_gemm* gemm, dso_stream stream);

// q, sf = x quantized with one scale per row per 128 columns.
typedef struct dso_per_token_cast {
    const void* x;  // [groups, m, k] of x_dtype, rows contiguous
    void* q;        // [groups, m, k] e4m3, contiguous
    float* sf;      // [groups, m, ceil(k / 128)]
    int64_t num_groups, m, k;
    int64_t x_stride_group, x_stride_m;
    int64_t sf_stride_group, sf_stride_m, sf_stride_k;
    dso_dtype x_dtype;
    float amax_floor;  // at least 1e-30
    int use_ue8m0;     // 1: scales are rounded up to powers of two
} dso_per_token_cast;

DSO_API dso_status dso_per_token_cast_to_fp8(const dso_per_token_cast* cast, dso_stream stream);

// q, sf = x quantized with one scale per block of 128 x 128.
typedef struct dso_per_block_cast {
    const void* x;  // [groups, n, k] of x_dtype, rows contiguous
    void* q;        // [groups, n, k] e4m3, contiguous
    float* sf;      // [groups, ceil(n / 128), ceil(k / 128)], contiguous
    int64_t num_groups, n, k;
    int64_t x_stride_group, x_stride_n;
    dso_dtype x_dtype;
    float amax_floor;  // at least 1e-30
    int use_ue8m0;     // 1: scales are rounded up to powers of two
} dso_per_block_cast;

DSO_API dso_status dso_per_block_cast_to_fp8(const dso_per_block_cast* cast, dso_stream stream);

// y = silu(gate) * up of x = (gate, up); or q, sf = that y quantized with one scale per row per 128 columns.
typedef struct dso_swiglu {
    const void* x;  // [groups, m, 2 * d] of x_dtype, rows contiguous
    void* y;        // [groups, m, d] of x_dtype, contiguous; null: quantize
    void* q;        // [groups, m, d] e4m3, contiguous; null: do not
    float* sf;      // [groups, m, ceil(d / 128)], with q
    int64_t num_groups, m, d;
    int64_t x_stride_group, x_stride_m;
    int64_t sf_stride_group, sf_stride_m, sf_stride_k;
    dso_dtype x_dtype;
    float amax_floor;  // at least 1e-30, with q
    int use_ue8m0;     // 1: scales are rounded up to powers of two
} dso_swiglu;

DSO_API dso_status dso_silu_mul(const dso_swiglu* silu_mul, dso_stream stream);

// y = rms_norm(x) * weight, or of residual_out = x + residual; or q, sf = that y quantized with one scale per row per
// 128 columns.
typedef struct dso_norm {
    const void* x;         // [groups, m, d] of x_dtype, rows contiguous
    const void* residual;  // the same, of strides of its own; null: nothing is added
    const void* weight;    // [d] of weight_dtype, contiguous
    void* residual_out;    // [groups, m, d] of x_dtype, contiguous; with residual
    void* y;               // [groups, m, d] of x_dtype, contiguous; null: quantize
    void* q;               // [groups, m, d] e4m3, contiguous; null: do not
    float* sf;             // [groups, m, ceil(d / 128)], with q
    int64_t num_groups, m, d;
    int64_t x_stride_group, x_stride_m;
    int64_t residual_stride_group, residual_stride_m;
    int64_t sf_stride_group, sf_stride_m, sf_stride_k;
    dso_dtype x_dtype, weight_dtype;  // the weight's is that of x, or DSO_F32
    float eps;                        // positive
    float amax_floor;                 // at least 1e-30, with q
    int use_ue8m0;                    // 1: scales are rounded up to powers of two
} dso_norm;

DSO_API dso_status dso_rms_norm(const dso_norm* norm, dso_stream stream);

// out, lse = attention of absorbed MLA over a paged cache of 576 channels, the first 512 of which are also the values.
// A key past its request's length, or of a page that does not exist, is not read. A row that sees no key gets zeros and
// an lse of -inf.
typedef struct dso_mla_decode {
    const void* q;                                  // [b, s_q, num_heads, 576] of dtype
    const void* kv_cache;                           // [num_pages, page_size, 576] of dtype
    const int32_t* block_table;                     // [b, max_pages], rows contiguous
    const int32_t* cache_seqlens;                   // [b]
    void* out;                                      // [b, s_q, num_heads, 512] of dtype
    float* lse;                                     // [b, s_q, num_heads], contiguous; natural logarithm
    void* workspace;                                // as many bytes as the plan says
    int64_t b, s_q, num_heads;                      // num_heads at least 1
    int64_t num_pages, page_size, max_pages;        // page_size at least 1
    int64_t q_stride_b, q_stride_s, q_stride_h;     // multiples of 8, as are all but the table's: rows are aligned
    int64_t page_stride, key_stride, table_stride;  // to 16 bytes
    int64_t out_stride_b, out_stride_s, out_stride_h;
    dso_dtype dtype;       // DSO_BF16 or DSO_F16
    double softmax_scale;  // positive
    int causal;            // 1: query i of s_q sees the keys up to cache_seqlens - s_q + i; 0: all
} dso_mla_decode;

// How many CTAs share the keys of a request, from extents alone: 1, 2, 4 or 8 of a cluster, and clusters.
typedef struct dso_mla_decode_plan {
    int cluster_size, num_parts;
    int64_t workspace_bytes;
} dso_mla_decode_plan;

// The plan for the current device, and the launch by it or by another.
DSO_API dso_status dso_plan_mla_decode(const dso_mla_decode* decode, dso_mla_decode_plan* plan);
DSO_API dso_status dso_mla_decode_by_plan(const dso_mla_decode* decode, const dso_mla_decode_plan* plan,
                                          dso_stream stream);

// The GEMM and the per-token quantization on host memory, in plain loops: for NumPy arrays, and as an oracle beside
// torch.
DSO_API dso_status dso_fp8_gemm_nt_host(const dso_fp8_gemm* gemm);
DSO_API dso_status dso_per_token_cast_to_fp8_host(const dso_per_token_cast* cast);

#ifdef __cplusplus
}  // extern "C"
#endif
