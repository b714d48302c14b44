// Attention over two sets of keys from that over each:   lse = log(exp(lse_a) + exp(lse_b)),
//                                                        out = exp(lse_a - lse) * out_a + exp(lse_b - lse) * out_b
//
//   out_a, out_b, out   [groups, m, d]   bf16, f16 or f32, rows contiguous; out contiguous    16-byte loads and stores
//   lse_a, lse_b, lse   [groups, m]      f32, contiguous                                      4-byte ones
//
// Work      A thread takes two chunks of eight channels of a row, of both inputs, all loaded before the first is used;
//           threadIdx is (chunk, row). Each thread makes its row's weights for itself.
// Numerics  float32, one rounding to the type of out. Where one lse is -inf the other's bits pass through, whatever
//           stands beside it; where both are, out is 0 and lse -inf.
// Limits    any m, d >= 0, d < 2^30. Rows of more than 4096 channels, and those that are not aligned, are taken one
//           element at a time.
// Source    Milakov and Gimelshein, arXiv:1805.02867, section 3.1.   Launched by launch/merge_attn_states.cu
#pragma once

#include "device/chunk.cuh"
#include "kernels/merge_attn_states_arguments.h"

namespace dso {

inline constexpr int kMergeThreads = 256;
inline constexpr int kMergeChunks = 2;  // of a thread

DSO_DEVICE float log_add_exp(float a, float b) {
    const float difference = a == b ? 0.f : fabsf(a - b);  // that of two infinities would be NaN
    return fmaxf(a, b) + log1pf(expf(-difference));
}

template <typename T, bool kVectorized>
__global__ void __launch_bounds__(kMergeThreads, 1)
    merge_attn_states_kernel(const __grid_constant__ MergeAttnStatesArguments arguments) {
    const int64_t m = arguments.m;
    const int d = static_cast<int>(arguments.d);
    const uint32_t group = arguments.num_groups == 1 ? 0 : blockIdx.x / arguments.ctas_per_group;
    const int64_t row = int64_t{blockIdx.x - group * arguments.ctas_per_group} * blockDim.y + threadIdx.y;
    if (row >= m) return;
    const int64_t out_row = group * m + row;
    const T* a_row =
        static_cast<const T*>(arguments.out_a) + group * arguments.a_stride_group + row * arguments.a_stride_m;
    const T* b_row =
        static_cast<const T*>(arguments.out_b) + group * arguments.b_stride_group + row * arguments.b_stride_m;
    T* target = static_cast<T*>(arguments.out) + out_row * d;
    const float lse_a = arguments.lse_a[out_row], lse_b = arguments.lse_b[out_row];
    const bool empty_a = lse_a == -INFINITY, empty_b = lse_b == -INFINITY;

    const int step = static_cast<int>(blockDim.x) * kChunk;
    for (int first = static_cast<int>(threadIdx.x) * kChunk; first < d; first += kMergeChunks * step) {
        Chunk<T> a[kMergeChunks], b[kMergeChunks];
#pragma unroll
        for (int i = 0; i < kMergeChunks; ++i) {
            const int column = first + i * step;
            a[i] = load_chunk<kVectorized>(a_row + column, d - column);
            b[i] = load_chunk<kVectorized>(b_row + column, d - column);
        }
        const float lse = log_add_exp(lse_a, lse_b);
        const float weight_a = expf(lse_a - lse), weight_b = expf(lse_b - lse);
#pragma unroll
        for (int i = 0; i < kMergeChunks; ++i) {
            float x[kChunk], y[kChunk];
            to_floats(a[i], x);
            to_floats(b[i], y);
#pragma unroll
            for (int j = 0; j < kChunk; ++j) x[j] = __fmaf_rn(weight_a, x[j], weight_b * y[j]);
            Chunk<T> merged = round_to<T>(x);
            if (empty_a) merged = b[i];
            if (empty_b) merged = empty_a ? Chunk<T>{} : a[i];
            const int column = first + i * step;
            store_chunk<kVectorized>(target + column, merged, d - column);
        }
        if (kVectorized) break;
    }
    if (threadIdx.x == 0) arguments.lse[out_row] = log_add_exp(lse_a, lse_b);
}

}  // namespace dso
