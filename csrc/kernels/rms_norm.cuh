// RMSNorm:   y = T(x * rsqrt(mean(x^2) + eps) * weight);   with x = T(x + residual) before, or q, sf = y quantized
// after
//
//   x, residual       [groups, m, d]            bf16, f16 or f32, rows contiguous    16-byte loads where aligned
//   weight            [d]                       the type of x, or f32
//   y, residual_out   [groups, m, d]            the type of x, contiguous            16-byte stores
//   q                 [groups, m, d]            e4m3, contiguous                     8-byte stores
//   sf                [groups, m, ceil(d/128)]  f32, any strides                     one store a block of 128
//
// Work      blockDim.x threads a row, blockDim.y rows a CTA. A thread has kChunks chunks of eight elements, two of them
//           in one block of 128 (one, if it has no more), as in device/patch.cuh. They stay in registers from the sum
//           to the output: x is read once, unless the row is longer than the CTA's registers (then again, from the
//           cache).
// Numerics  float32, one rounding to T at the end; the mean is the sum times 1 / d rounded. The order of the sum
// depends
//           on d alone (rms_norm_shape): by element within a thread, then over the lanes of a warp, then over warps. So
//           neither other rows, nor strides, nor what is fused with it change a row's bits; and the fused ops give the
//           bits of the separate ones.
// Limits    any m, d >= 0, d < 2^30; rows that are not aligned are taken one element at a time.
// Source    Zhang and Sennrich, arXiv:1910.07467, equation 4.   Launched by launch/rms_norm.cu
#pragma once

#include "device/cast_blocks.cuh"
#include "device/cast_output.h"
#include "kernels/rms_norm_arguments.h"
#include "ptx/shared_memory.cuh"
#include "ptx/sync.cuh"

namespace dso {

inline constexpr int kNormMaxThreads = 512;  // a row, and a CTA
inline constexpr int kNormMaxWarps = kNormMaxThreads / 32;
inline constexpr int kNormMaxChunks = 4;  // of a thread

struct NormSums {
    float of_warp[kNormMaxWarps][kNormMaxWarps];  // [row of the CTA][warp of the row]
};

/// The sum of a value over the threads of a row, to all of them, in one order.
DSO_DEVICE float sum_over_row(float x) {
    auto& of_warp = ptx::static_shared<NormSums>().of_warp;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, offset);
    if (blockDim.x == 32) return x;
    const uint32_t num_warps = blockDim.x / 32, warp = threadIdx.x % kNormMaxWarps;
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.y][threadIdx.x / 32] = x;
    __syncthreads();
    x = warp < num_warps ? of_warp[threadIdx.y][warp] : 0.f;
#pragma unroll
    for (int offset = kNormMaxWarps / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xFFFFFFFF, x, offset);
    return x;
}

template <typename T, typename Weight, bool kAdd, bool kCast, int kChunks, bool kOnePanel, bool kVectorized>
__global__ void __launch_bounds__(kNormMaxThreads, 1)
    rms_norm_kernel(const __grid_constant__ RmsNormArguments arguments) {
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    const int64_t m = arguments.m;
    const int d = static_cast<int>(arguments.d);
    const uint32_t group = arguments.num_groups == 1 ? 0 : blockIdx.x / arguments.ctas_per_group;
    const int64_t row = int64_t{blockIdx.x - group * arguments.ctas_per_group} * blockDim.y + threadIdx.y;
    const int64_t out_row = group * m + row;
    const T* x_row = static_cast<const T*>(arguments.x) + group * arguments.x_stride_group + row * arguments.x_stride_m;
    const T* residual_row = static_cast<const T*>(arguments.residual) + group * arguments.residual_stride_group +
                            row * arguments.residual_stride_m;
    T* sum_row = static_cast<T*>(arguments.residual_out) + out_row * d;
    const auto* weight = static_cast<const Weight*>(arguments.weight);

    // A panel is what the threads hold at once; kOnePanel says that it is the whole row.
    const int panels_end = kOnePanel ? 1 : d;
    constexpr bool kWeightsEarly = kOnePanel && kVectorized;  // they wait in registers while the row is summed
    const int panel_step = static_cast<int>(blockDim.x) * (kChunk * kChunks);
    constexpr int kParts = kChunks == 1 ? 1 : 2;  // chunks of a thread in a block of 128
    constexpr int kLanes = kQuantizeBlock / kChunk / kParts;
    const int first = threadIdx.x / kLanes * kQuantizeBlock + threadIdx.x % kLanes * kChunk;
    const auto column_of = [&](int panel, int i) {
        return panel + first + i / kParts * static_cast<int>(blockDim.x) * (kChunk * kParts) +
               i % kParts * (kLanes * kChunk);
    };
    const int end = row < m ? d : 0;  // what is beyond the last row takes part in barriers only
    Chunk<T> x[kChunks];
    Chunk<Weight> weights[kChunks];
    const auto load = [&](auto& chunks, const auto* source, int panel) {
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            const int column = column_of(panel, i);
            chunks[i] = load_chunk<kVectorized>(source + column, end - column);
        }
    };

    float sum = 0.f;
    for (int panel = 0; panel < panels_end; panel += kOnePanel ? 1 : panel_step) {
        Chunk<T> residual[kChunks];
        load(x, x_row, panel);
        if constexpr (kAdd) load(residual, residual_row, panel);
        if constexpr (kWeightsEarly) load(weights, weight, panel);
        if constexpr (kAdd) {
#pragma unroll
            for (int i = 0; i < kChunks; ++i) {
                float values[kChunk], others[kChunk];
                to_floats(x[i], values);
                to_floats(residual[i], others);
#pragma unroll
                for (int j = 0; j < kChunk; ++j) values[j] += others[j];
                x[i] = round_to<T>(values);
                const int column = column_of(panel, i);
                store_chunk<kVectorized>(sum_row + column, x[i], end - column);
            }
        }
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            float values[kChunk];
            to_floats(x[i], values);
#pragma unroll
            for (int j = 0; j < kChunk; ++j) sum = __fmaf_rn(values[j], values[j], sum);
        }
    }
    const float scale = rsqrtf(__fmaf_rn(sum_over_row(sum), arguments.inverse_d, arguments.eps));

    for (int panel = 0; panel < panels_end; panel += kOnePanel ? 1 : panel_step) {
        if (!kOnePanel && panel_step < d) load(x, kAdd ? sum_row : x_row, panel);
        if constexpr (!kWeightsEarly) load(weights, weight, panel);
        Chunk<T> y[kChunks / kParts][kParts];
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
            float values[kChunk], factors[kChunk];
            to_floats(x[i], values);
            to_floats(weights[i], factors);
#pragma unroll
            for (int j = 0; j < kChunk; ++j) values[j] = values[j] * scale * factors[j];
            y[i / kParts][i % kParts] = round_to<T>(values);
        }
        if constexpr (kCast) {
            constexpr int kBlocks = kChunks / kParts;
            const CastOutput& output = arguments.output;
            const auto scales = scale_blocks<kLanes, kBlocks>(y, output.amax_floor, output.use_ue8m0);
#pragma unroll
            for (int i = 0; i < kChunks; ++i) {
                const int column = column_of(panel, i);
                store_e4m3<kVectorized>(output.q + out_row * d + column,
                                        cast_chunk(y[i / kParts][i % kParts], scales.inverse[i / kParts]),
                                        end - column);
            }
            const int own = threadIdx.x % kLanes, column = column_of(panel, own * kParts) - own * kChunk;
            if (own < kBlocks && column < end) {
                output.sf[group * output.sf_stride_group + row * output.sf_stride_m +
                          column / kQuantizeBlock * output.sf_stride_k] = scales.sf;
            }
        } else {
#pragma unroll
            for (int i = 0; i < kChunks; ++i) {
                const int column = column_of(panel, i);
                store_chunk<kVectorized>(static_cast<T*>(arguments.y) + out_row * d + column, y[i / kParts][i % kParts],
                                         end - column);
            }
        }
    }
}

}  // namespace dso
