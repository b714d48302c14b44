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
    int b_is_constant;    // 1: nothing that is still running on the stream writes b
    void* workspace;      // as many bytes as the op's workspace function says, 16-byte aligned, of any content; or null
} dso_fp8_gemm;

DSO_API dso_status dso_fp8_gemm_nt(const dso_fp8_gemm* gemm, dso_stream stream);

// What a GEMM of this shape can use besides its operands, which it does without where `workspace` is null: room for the
// sums of tiles that CTAs share.
DSO_API dso_status dso_fp8_gemm_workspace(const dso_fp8_gemm* gemm, int64_t* num_bytes);

// What computes a shape: a compiled tile, the number of CTAs that share one along k, and how many of the last tiles all
// CTAs share, step by step.
typedef struct dso_fp8_gemm_plan {
    int config;  // its place in fp8_gemm_configs.def
    int block_m, block_n, num_k_groups, num_stages, swaps_operands, shared_bytes, most_splits;
    int num_splits, num_shared_tiles;
} dso_fp8_gemm_plan;

// The plan that dso_fp8_gemm_nt follows on a GPU of `num_sms`.
DSO_API dso_status dso_plan_fp8_gemm(int64_t m, int64_t n, int64_t k, int batch_invariant, int num_sms,
                                     dso_fp8_gemm_plan* plan);

// dso_fp8_gemm_nt by a plan of one's own: any config; 1, 2, 4 or 8 splits up to its most; and shared tiles,
// with a step of k for each SM at least, of the largest config. These need dso_fp8_gemm_sharing_bytes of workspace.
DSO_API dso_status dso_fp8_gemm_nt_by_plan(const dso_fp8_gemm* gemm, int config, int num_splits, int num_shared_tiles,
                                           dso_stream stream);
DSO_API int64_t dso_fp8_gemm_sharing_bytes(int num_sms);

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

// What it can use besides its operands, as `gemm.workspace`: a count of the tiles that CTAs have drawn.
DSO_API dso_status dso_m_grouped_fp8_gemm_workspace(const dso_m_grouped_fp8_gemm* gemm, int64_t* num_bytes);

// The same by a tile of one's own: its place in fp8_gemm_configs.def, where steps of k are not taken in turn.
DSO_API dso_status dso_m_grouped_fp8_gemm_nt_by_plan(const dso_m_grouped_fp8_gemm* gemm, int config, dso_stream stream);

// d[r] = a[r] @ b[i].T for the rows r of group i, summed up in float32. Nobody's rows are not written.
typedef struct dso_m_grouped_bf16_gemm {
    const void* a;                         // [m, k] bfloat16, rows contiguous, 16-byte aligned
    const void* b;                         // [num_groups, n, k] bfloat16, rows contiguous, 16-byte aligned
    void* d;                               // [m, n] bfloat16, rows contiguous, 16-byte aligned
    const int32_t* offsets;                // [num_groups + 1], as the layout of DSO_ROWS_OFFSETS
    int64_t num_groups, m, n, k;           // n and k multiples of 8
    int64_t a_stride, b_stride, d_stride;  // between rows
    int64_t b_stride_group;                // between matrices
    int clear_unowned;                     // 1: nobody's rows become zeros
} dso_m_grouped_bf16_gemm;

DSO_API dso_status dso_m_grouped_bf16_gemm_nt(const dso_m_grouped_bf16_gemm* gemm, dso_stream stream);

// The same by a tile of one's own: its place in bf16_gemm_configs.def.
DSO_API dso_status dso_m_grouped_bf16_gemm_nt_by_plan(const dso_m_grouped_bf16_gemm* gemm, int config,
                                                      dso_stream stream);

// d[i] = (a * sfa) @ (b * sfb).T over the columns that group i owns, or d[i] += it.
typedef struct dso_k_grouped_fp8_gemm {
    dso_fp8_gemm gemm;  // of all columns, k a multiple of 128, and of one matrix of d; sfb has a scale for each row
    int64_t d_stride_group;  // between matrices of d
    int64_t num_groups;
    const int32_t* k_offsets;  // [num_groups + 1]: group i owns columns k_offsets[i] to k_offsets[i + 1]; an offset
                               // counts as the largest so far, rounded down to a multiple of 128
} dso_k_grouped_fp8_gemm;

DSO_API dso_status dso_k_grouped_fp8_gemm_nt(const dso_k_grouped_fp8_gemm* group, dso_stream stream);

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

// y = x with each pair of channels of a token rotated by the angles of its position.
typedef struct dso_rotation {
    const void* x;          // [t, num_heads, d] of dtype, rows contiguous
    void* y;                // [t, num_heads, d] of dtype, contiguous
    const void* positions;  // [t] int32 or int64, clamped to the table
    const float* cos_sin;   // [max_position, d], rows contiguous: d / 2 cosines, then as many sines
    int64_t t, num_heads, d, max_position;
    int64_t x_stride_t, x_stride_head, cos_sin_stride;
    dso_dtype dtype;
    int positions_are_64_bit;
    int interleaved;  // 1: pairs are neighbours; 0: channels i and i + d / 2
} dso_rotation;

DSO_API dso_status dso_rope(const dso_rotation* rotation, dso_stream stream);

// What a token's row in the latent cache consists of: elements of a dtype; or 512 e4m3, 4 float32 scales, each of 128
// of them, and 64 bfloat16, together 656 bytes; or 576 e4m3, of which the cache has one scale, kv_scale.
typedef enum dso_latent_format { DSO_LATENT_PLAIN, DSO_LATENT_FP8_BLOCKS, DSO_LATENT_FP8 } dso_latent_format;

// The rows of a step's tokens in the paged latent cache: norm(kv_c) | rope(k_pe), or the FP8 format of that.
typedef struct dso_latent_write {
    const void* kv_c;         // [num_tokens, kv_lora_rank] of dtype, rows contiguous
    const void* k_pe;         // [num_tokens, rope_dim] of dtype, rows contiguous
    const void* positions;    // [num_tokens] int32 or int64
    const float* cos_sin;     // [max_position, rope_dim], contiguous: rope_dim / 2 cosines, as many sines
    const void* slots;        // [num_tokens] int32 or int64; a slot that does not exist is skipped
    void* kv_cache;           // [num_pages, page_size] rows of the format; plain: kv_lora_rank + rope_dim of dtype
    const void* norm_weight;  // [kv_lora_rank] of weight_dtype; null: the latents are written as they are
    int64_t num_tokens, kv_lora_rank, rope_dim, max_position, num_pages, page_size;
    int64_t kv_c_stride, k_pe_stride;  // between tokens
    int64_t page_stride, row_stride;   // of the cache, in its elements, which are bytes if not plain
    dso_dtype dtype, weight_dtype;     // the weight's is that of kv_c, or DSO_F32
    dso_latent_format format;
    int positions_are_64_bit, slots_are_64_bit;
    int interleaved;   // 1: pairs are neighbours; 0: channels i and i + rope_dim / 2
    float eps;         // positive, with norm_weight
    float amax_floor;  // at least 1e-30, with DSO_LATENT_FP8_BLOCKS
    float kv_scale;    // positive, with DSO_LATENT_FP8
} dso_latent_write;

DSO_API dso_status dso_mla_cache_write(const dso_latent_write* write, dso_stream stream);

// The cached tokens of a batch, one request after the other. Rows without a cached token become zeros.
typedef struct dso_latent_gather {
    const void* kv_cache;        // [num_pages, page_size] rows of the format; plain: d of dtype
    const int32_t* block_table;  // [b, max_pages], rows contiguous
    const int32_t* cu_seqlens;   // [b + 1]: token j of request i becomes row cu_seqlens[i] + j
    void* out;                   // [total, d] of out_dtype, contiguous
    int64_t b, total, d;         // d is 576 if not plain
    int64_t num_pages, page_size, max_pages;
    int64_t page_stride, row_stride;  // of the cache, in its elements, which are bytes if not plain
    int64_t table_stride;
    dso_dtype dtype, out_dtype;
    dso_latent_format format;  // rows that are not plain are aligned to 16 bytes
    float kv_scale;            // positive, with DSO_LATENT_FP8
} dso_latent_gather;

DSO_API dso_status dso_mla_cache_gather(const dso_latent_gather* gather, dso_stream stream);

// Attention over the union of two sets of keys, from the attention over each; lse -inf says that a set is empty.
typedef struct dso_attn_states {
    const void *out_a, *out_b;   // [groups, m, d] of dtype, rows contiguous
    const float *lse_a, *lse_b;  // [groups, m], contiguous, natural logarithms
    void* out;                   // [groups, m, d] of dtype, contiguous
    float* lse;                  // [groups, m], contiguous
    int64_t num_groups, m, d;
    int64_t a_stride_group, a_stride_m;
    int64_t b_stride_group, b_stride_m;
    dso_dtype dtype;
} dso_attn_states;

DSO_API dso_status dso_merge_attn_states(const dso_attn_states* states, dso_stream stream);

// The experts of each token, best first, among those of its best groups, and their weights.
typedef struct dso_gate {
    const float* logits;  // [t, num_experts], rows contiguous
    const float* bias;    // [num_experts]; null: none
    float* topk_weights;  // [t, num_topk], contiguous
    int32_t* topk_idx;    // [t, num_topk], contiguous
    int64_t t, num_experts;
    int64_t num_groups, num_topk, num_topk_groups;  // num_groups divides num_experts
    int64_t logits_stride;
    int is_softmax;  // 1: softmax, groups by their best choice; 0: sigmoid, groups by their two best
    int normalizes;  // 1: the weights are divided by their sum
    float scale;     // of the weights
} dso_gate;

DSO_API dso_status dso_moe_gate(const dso_gate* gate, dso_stream stream);

// The rows of the experts' input: all pairs of a token and an expert, ordered by expert.
typedef struct dso_expert_rows {
    const int32_t* topk_idx;  // [t, num_topk], contiguous; values that are no expert get no row
    int32_t* token_idx;       // [num_rows]: the token of a row, -1 in padding
    int32_t* row_idx;         // [t, num_topk], contiguous: the row of a pair, -1 where it has none
    int32_t* offsets;         // [num_experts + 1]: the first row of each expert, multiples of alignment
    int32_t* m_indices;       // [num_rows]: the expert of a row, -1 in padding
    int64_t t, num_topk, num_experts, alignment;
    int64_t num_rows;  // with j = min(num_experts, n) of n pairs: alignment * (j + (n - j) / alignment)
} dso_expert_rows;

DSO_API dso_status dso_moe_mapping(const dso_expert_rows* rows, dso_stream stream);

// out[r, :] = x[token_idx[r], :], and zeros where that is no token.
typedef struct dso_row_gather {
    const void* x;             // [t, d], any strides
    const int32_t* token_idx;  // [num_rows]
    void* out;                 // [num_rows, d], contiguous
    int64_t t, d, num_rows;
    int64_t x_stride_t, x_stride_d;
    int64_t element_bytes;  // 1, 2, 4, 8 or 16
} dso_row_gather;

DSO_API dso_status dso_moe_permute(const dso_row_gather* gather, dso_stream stream);

// out[i, :] = sum over j of topk_weights[i, j] * y[row_idx[i, j], :], without those of no row.
typedef struct dso_row_sum {
    const void* y;              // [num_rows, d] of dtype, rows contiguous
    const int32_t* row_idx;     // [t, num_topk], contiguous
    const float* topk_weights;  // [t, num_topk], contiguous
    void* out;                  // [t, d] of dtype, contiguous
    int64_t num_rows, t, d, num_topk;
    int64_t y_stride;
    dso_dtype dtype;
} dso_row_sum;

DSO_API dso_status dso_moe_unpermute(const dso_row_sum* sum, dso_stream stream);

// out, lse = attention of absorbed MLA over a paged cache of 576 channels, the first 512 of which are also the values.
// An FP8 cache is multiplied in float16, to which its keys are rounded.
// A key past its request's length, or of a page that does not exist, is not read. A row that sees no key gets zeros and
// an lse of -inf.
// With cu_seqlens_q, q, out and lse have no dimension b: s_q is the queries of all requests, and request i has the rows
// cu_seqlens_q[i] up to cu_seqlens_q[i + 1], clamped to those there are, each counting as the largest so far. A row of
// no request sees no key.
typedef struct dso_mla_decode {
    const void* q;                                  // [b, s_q, num_heads, 576] of dtype
    const void* kv_cache;                           // [num_pages, page_size] rows of the format; plain: 576 of dtype
    const int32_t* block_table;                     // [b, max_pages], rows contiguous
    const int32_t* cache_seqlens;                   // [b]
    const int32_t* cu_seqlens_q;                    // [b + 1], or null
    void* out;                                      // [b, s_q, num_heads, 512] of dtype
    float* lse;                                     // [b, s_q, num_heads], contiguous; natural logarithm
    void* workspace;                                // as many bytes as the plan says
    int64_t b, s_q, num_heads;                      // num_heads at least 1
    int64_t num_pages, page_size, max_pages;        // page_size at least 1
    int64_t q_stride_b, q_stride_s, q_stride_h;     // rows of q, of the cache and of out are aligned to 16 bytes
    int64_t page_stride, key_stride, table_stride;  // the cache's in its elements, which are bytes if not plain
    int64_t out_stride_b, out_stride_s, out_stride_h;
    dso_dtype dtype;       // DSO_BF16 or DSO_F16
    double softmax_scale;  // positive
    int causal;            // 1: query i of s_q sees the keys up to cache_seqlens - s_q + i; 0: all
    dso_latent_format format;
    float kv_scale;       // positive, with DSO_LATENT_FP8
    int batch_invariant;  // 1: the bits of a request depend on its own operands alone
} dso_mla_decode;

// How many CTAs share the keys of a tile of rows, from extents alone: 1, 2, 4 or 8 of a cluster, and clusters. A tile
// is up to tile_rows rows of a request, 64 or 16, a row being a (query, head) pair. With tiles_per_part, a request of
// fewer than num_parts times so many tiles of 64 keys has only as many clusters as it fills; with 0 all have num_parts.
typedef struct dso_mla_decode_plan {
    int cluster_size, num_parts, tiles_per_part, tile_rows;
    int64_t workspace_bytes;
} dso_mla_decode_plan;

// The plan for the current device, and the launch by it or by another.
DSO_API dso_status dso_plan_mla_decode(const dso_mla_decode* decode, dso_mla_decode_plan* plan);
DSO_API dso_status dso_mla_decode_by_plan(const dso_mla_decode* decode, const dso_mla_decode_plan* plan,
                                          dso_stream stream);

// out, lse = attention of a batch of sequences, each head with keys of 192 channels and values of 128 of its own.
// Sequence i has the rows cu_seqlens_q[i] up to cu_seqlens_q[i + 1] of q, and likewise of k and v. Offsets are clamped
// to the rows there are, and each counts as the largest so far. A row that sees no key, or is of no sequence, gets
// zeros and an lse of -inf.
typedef struct dso_prefill {
    const void* q;                           // [total_q, num_heads, 192] of dtype
    const void* k;                           // [total_k, num_heads, 192] of dtype
    const void* v;                           // [total_k, num_heads, 128] of dtype
    const int32_t* cu_seqlens_q;             // [b + 1]
    const int32_t* cu_seqlens_k;             // [b + 1]
    void* out;                               // [total_q, num_heads, 128] of dtype, contiguous
    float* lse;                              // [total_q, num_heads], contiguous; natural logarithm
    void* workspace;                         // DSO_PREFILL_WORKSPACE_BYTES
    int64_t b, total_q, total_k, num_heads;  // num_heads at least 1
    int64_t q_stride_t, q_stride_h;          // multiples of 8, as are the others: rows are aligned to 16 bytes
    int64_t k_stride_t, k_stride_h;
    int64_t v_stride_t, v_stride_h;
    dso_dtype dtype;       // DSO_BF16 or DSO_F16
    double softmax_scale;  // positive
    int causal;            // 1: query i of s_q sees the first s_k - s_q + i + 1 keys; 0: all s_k
} dso_prefill;

enum { DSO_PREFILL_WORKSPACE_BYTES = 4 };

DSO_API dso_status dso_mla_prefill(const dso_prefill* prefill, dso_stream stream);

// The GEMM and the per-token quantization on host memory, in plain loops: for NumPy arrays, and as an oracle beside
// torch.
DSO_API dso_status dso_fp8_gemm_nt_host(const dso_fp8_gemm* gemm);
DSO_API dso_status dso_per_token_cast_to_fp8_host(const dso_per_token_cast* cast);

#ifdef __cplusplus
}  // extern "C"
#endif
