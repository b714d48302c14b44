// Rows gathered by index:   out[r, :] = x[token_idx[r], :],   all bits zero where token_idx[r] is no token
//
//   x          [t, d]     elements of 1, 2, 4, 8 or 16 bytes, any strides
//   token_idx  [rows]     int32
//   out        [rows, d]  contiguous
//
// Work      The launcher takes rows that are whole vectors as rows of 16-byte elements. A thread copies four elements
//           of a row, all loaded before the first is stored, and neighbours are neighbours in the row; threadIdx is
//           (element, row), and so is the grid the other way round.
// Limits    any t and rows, fewer than 65536 * 1024 elements a row.   Launched by launch/moe_permute.cu
#pragma once

#include "kernels/moe_permute_arguments.h"
#include "ptx/sync.cuh"

namespace dso {

inline constexpr int kPermuteThreads = 256;
inline constexpr int kPermuteElements = 4;  // of a thread

template <typename Element>
__global__ void __launch_bounds__(kPermuteThreads)
    moe_permute_kernel(const __grid_constant__ MoePermuteArguments arguments) {
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    const int64_t row = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
    if (row >= arguments.num_rows) return;
    const int32_t token = arguments.token_idx[row];
    const bool is_token = token >= 0 && token < arguments.t;
    const int64_t first = int64_t{blockIdx.y} * blockDim.x * kPermuteElements + threadIdx.x;
    const auto* source = static_cast<const Element*>(arguments.x) + token * arguments.x_stride_t;
    auto* target = static_cast<Element*>(arguments.out) + row * arguments.d;

    Element elements[kPermuteElements];
#pragma unroll
    for (int i = 0; i < kPermuteElements; ++i) {
        const int64_t column = first + i * blockDim.x;
        elements[i] = Element{};
        if (is_token && column < arguments.d) elements[i] = source[column * arguments.x_stride_d];
    }
#pragma unroll
    for (int i = 0; i < kPermuteElements; ++i) {
        const int64_t column = first + i * blockDim.x;
        if (column < arguments.d) target[column] = elements[i];
    }
}

}  // namespace dso
