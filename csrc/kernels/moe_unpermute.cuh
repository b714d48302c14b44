// Weighted sums of rows:   out[i, :] = sum_j topk_weights[i, j] * y[row_idx[i, j], :],   without those of no row
//
//   y                      [rows, d]     bf16, f16 or f32, rows contiguous    16-byte loads where rows are aligned
//   row_idx, topk_weights  [t, num_topk] int32, f32, contiguous
//   out                    [t, d]        the type of y, contiguous            16-byte stores
//
// Work      A thread has a chunk of eight columns of a token, and loads it of eight rows (of four, in float32) before
//           it adds the first. threadIdx is (chunk, token), and so is the grid the other way round.
// Numerics  float32, each product rounded, then added in the order of j; one rounding to the type of y. Bit for bit the
//           reference in deepseek_ops/moe.py.
// Limits    any rows, t, num_topk; d below 2^27. Rows that are not aligned are taken one element at a time.
// Source    DeepSeek-V3 report, arXiv:2412.19437, section 2.1.2.   Launched by launch/moe_unpermute.cu
#pragma once

#include "device/chunk.cuh"
#include "kernels/moe_unpermute_arguments.h"
#include "ptx/sync.cuh"

namespace dso {

inline constexpr int kUnpermuteThreads = 256;

/// Rows of which a thread has a chunk in flight: 128 bytes.
template <typename T>
inline constexpr int kUnpermuteRows = static_cast<int>(128 / sizeof(Chunk<T>));

template <typename T, bool kVectorized>
__global__ void __launch_bounds__(kUnpermuteThreads, 1)
    moe_unpermute_kernel(const __grid_constant__ MoeUnpermuteArguments arguments) {
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    const int64_t token = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (token >= arguments.t) return;
    const int64_t column = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * kChunk;
    const int columns_left = static_cast<int>(arguments.d - column);
    const T* source = static_cast<const T*>(arguments.y) + column;
    const int32_t* rows = arguments.row_idx + token * arguments.num_topk;
    const float* weights = arguments.topk_weights + token * arguments.num_topk;

    float sum[kChunk] = {};
    for (int first = 0; first < arguments.num_topk; first += kUnpermuteRows<T>) {
        Chunk<T> y[kUnpermuteRows<T>];
        float weight[kUnpermuteRows<T>];
#pragma unroll
        for (int i = 0; i < kUnpermuteRows<T>; ++i) {
            const int j = first + i;
            const int32_t row = j < arguments.num_topk ? rows[j] : -1;
            const bool is_row = row >= 0 && row < arguments.num_rows;
            // What is no row has the weight 0 and chunks of zeros, which add nothing.
            weight[i] = is_row ? weights[j] : 0.f;
            y[i] = load_chunk<kVectorized>(source + row * arguments.y_stride, is_row ? columns_left : 0);
        }
#pragma unroll
        for (int i = 0; i < kUnpermuteRows<T>; ++i) {
            float values[kChunk];
            to_floats(y[i], values);
#pragma unroll
            for (int k = 0; k < kChunk; ++k) sum[k] = __fadd_rn(sum[k], __fmul_rn(weight[i], values[k]));
        }
    }
    store_chunk<kVectorized>(static_cast<T*>(arguments.out) + token * arguments.d + column, round_to<T>(sum),
                             columns_left);
}

}  // namespace dso
