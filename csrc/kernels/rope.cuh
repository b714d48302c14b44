// Rotary embedding:   (a, b) -> (a cos - b sin, a sin + b cos)   for each pair of channels, by its token's angles
//
//   x          [t, heads, d]         bf16, f16 or f32, rows contiguous    16-byte loads where all is aligned for them
//   positions  [t]                   int32 or int64                       (of pairs that lie apart, two of 8 bytes)
//   cos_sin    [max_position, d]     f32, rows contiguous                 16-byte loads
//   y          [t, heads, d]         the type of x, contiguous            stores like the loads
//
// Work      A thread takes four pairs of kHeads heads of a token, all loaded before the first is used. threadIdx is
//           (four pairs, head, token), so that nothing is divided to find one's place, and a warp covers neighbouring
//           rows, whatever d is. The launcher cuts the CTA to the shape.
// Numerics  float32, each product rounded, then their sum; one rounding to T. Bit for bit the reference in
//           deepseek_ops/rope.py.
// Limits    any t, heads; d even and below 2^30. A position outside the table counts as its first or last. Rows of more
//           than 2048 channels, and those that are not aligned, are taken one element at a time, in loops (a loop would
//           cost the others their vector stores).
// Source    Su et al., arXiv:2104.09864, section 3.4.   Launched by launch/rope.cu
#pragma once

#include "device/rotary.cuh"
#include "kernels/rope_arguments.h"
#include "ptx/sync.cuh"

namespace dso {

inline constexpr int kRopeThreads = 256;

template <typename T, bool kInterleaved, int kHeads, bool kVectorized>
__global__ void __launch_bounds__(kRopeThreads, 1) rope_kernel(const __grid_constant__ RopeArguments arguments) {
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    const int64_t token = int64_t{blockIdx.x} * blockDim.z + threadIdx.z;
    if (token >= arguments.t) return;
    const int half = arguments.d / 2;
    const int64_t position = clamp_position(arguments.positions[token], arguments.max_position);
    const float* angles_row = arguments.cos_sin + position * arguments.cos_sin_stride;
    const T* x_token = static_cast<const T*>(arguments.x) + token * arguments.x_stride_t;
    T* y_token = static_cast<T*>(arguments.y) + token * arguments.num_heads * arguments.d;

    const int64_t head_step = int64_t{gridDim.y} * blockDim.y * kHeads;
    for (int pair = threadIdx.x * kRotaryPairs; pair < half; pair += blockDim.x * kRotaryPairs) {
        for (int64_t head = int64_t{blockIdx.y} * blockDim.y * kHeads + threadIdx.y; head < arguments.num_heads;
             head += head_step) {
            const int64_t heads_left = arguments.num_heads - head;
            const T* source = x_token + head * arguments.x_stride_head;
            T* target = y_token + head * arguments.d;
            Chunk<T> pairs[kHeads];
#pragma unroll
            for (int i = 0; i < kHeads; ++i) {
                if (i * blockDim.y < heads_left) pairs[i] = load_pairs<kVectorized>(source, pair, half, kInterleaved);
                source += blockDim.y * arguments.x_stride_head;
            }
            const RotaryAngles angles = load_rotary_angles<kVectorized>(angles_row, pair, half);
#pragma unroll
            for (int i = 0; i < kHeads; ++i) {
                float values[kChunk];
                to_floats(pairs[i], values);
                rotate_pairs(values, angles, kInterleaved);
                if (i * blockDim.y < heads_left)
                    store_pairs<kVectorized>(target, round_to<T>(values), pair, half, kInterleaved);
                target += int64_t{blockDim.y} * arguments.d;
            }
            if (kVectorized) break;
        }
        if (kVectorized) break;
    }
}

}  // namespace dso
