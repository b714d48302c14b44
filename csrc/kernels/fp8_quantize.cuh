// Quantization to e4m3 with one scale per row per 128 columns:   q = e4m3(x * (448 / amax)),   sf = amax / 448
//
//   x   [groups, m, k]             bf16, f16 or f32, rows contiguous    16-byte loads where rows are aligned for them
//   q   [groups, m, k]             e4m3, contiguous                     8-byte stores
//   sf  [groups, m, ceil(k/128)]   f32, any strides                     one store a block of 128
//
// Work      16 lanes a block of 128 elements, 8 elements a lane; a CTA of 256 threads takes 16 blocks at a time. Blocks
//           are dealt along the dimension in which sf is contiguous, so that neighbouring threads store neighbours.
// Numerics  amax over |x| without NaN; x * inverse rounded once in float32, then to e4m3 (nearest even, saturating).
//           NaN stays NaN. Bit for bit the reference in deepseek_ops/quantize.py.
// Limits    any m, k >= 0; a last block of fewer than 128 is a block of its own.
// Source    DeepSeek-V3 report, arXiv:2412.19437, section 3.3.   Launched by launch/fp8_quantize.cu
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/math.cuh"
#include "device/quantize.cuh"
#include "kernels/fp8_quantize_arguments.h"
#include "ptx/matrix.cuh"

namespace dso {

inline constexpr int kQuantizeThreads = 256;
inline constexpr int kLanesPerBlock = 16;
inline constexpr int kElementsPerLane = 8;
inline constexpr int kQuantizeBlock = kLanesPerBlock * kElementsPerLane;

DSO_DEVICE float to_float(float x) { return x; }
DSO_DEVICE float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
DSO_DEVICE float to_float(__half x) { return __half2float(x); }

/// Eight elements at once; the caller knows that they exist and are aligned.
template <typename T>
DSO_DEVICE void load_vector(const T* source, float (&x)[kElementsPerLane]) {
    constexpr int kNumVectors = sizeof(T) * kElementsPerLane / sizeof(uint4);
    union {
        uint4 vectors[kNumVectors];
        T elements[kElementsPerLane];
    } loaded;
#pragma unroll
    for (int i = 0; i < kNumVectors; ++i) loaded.vectors[i] = __ldg(reinterpret_cast<const uint4*>(source) + i);
#pragma unroll
    for (int i = 0; i < kElementsPerLane; ++i) x[i] = to_float(loaded.elements[i]);
}

/// Up to eight elements one by one; those beyond `count` are zeros.
template <typename T>
DSO_DEVICE void load_scalar(const T* source, int count, float (&x)[kElementsPerLane]) {
#pragma unroll
    for (int i = 0; i < kElementsPerLane; ++i) x[i] = i < count ? to_float(source[i]) : 0.f;
}

template <typename T, bool kVectorized>
__global__ void __launch_bounds__(kQuantizeThreads)
    per_token_cast_to_fp8_kernel(const __grid_constant__ PerTokenCastArguments arguments) {
    const int num_k_blocks = ceil_div<int64_t>(arguments.k, kQuantizeBlock);
    const int64_t num_blocks = arguments.num_groups * arguments.m * num_k_blocks;
    const int lane = threadIdx.x % kLanesPerBlock;
    const uint32_t half_warp = 0xFFFFu << (threadIdx.x % 32 / kLanesPerBlock * kLanesPerBlock);
    const int64_t step = int64_t{gridDim.x} * (kQuantizeThreads / kLanesPerBlock);

    for (int64_t block = (int64_t{blockIdx.x} * kQuantizeThreads + threadIdx.x) / kLanesPerBlock; block < num_blocks;
         block += step) {
        int64_t group, row;
        int k_block;
        if (arguments.rows_are_adjacent) {
            row = block % arguments.m;
            k_block = block / arguments.m % num_k_blocks;
            group = block / arguments.m / num_k_blocks;
        } else {
            k_block = block % num_k_blocks;
            row = block / num_k_blocks % arguments.m;
            group = block / num_k_blocks / arguments.m;
        }
        const int64_t column = int64_t{k_block} * kQuantizeBlock + lane * kElementsPerLane;
        const T* source =
            static_cast<const T*>(arguments.x) + group * arguments.x_stride_group + row * arguments.x_stride_m + column;
        const int64_t left = arguments.k - column;
        const int count = left < 0 ? 0 : left < kElementsPerLane ? static_cast<int>(left) : kElementsPerLane;

        float x[kElementsPerLane];
        if (kVectorized && count == kElementsPerLane) {
            load_vector(source, x);
        } else {
            load_scalar(source, count, x);
        }

        float amax = 0.f;  // fmaxf passes over NaN
#pragma unroll
        for (int i = 0; i < kElementsPerLane; ++i) amax = fmaxf(amax, fabsf(x[i]));
#pragma unroll
        for (int offset = kLanesPerBlock / 2; offset > 0; offset /= 2)
            amax = fmaxf(amax, __shfl_xor_sync(half_warp, amax, offset));
        const BlockScale scale = block_scale(amax, arguments.amax_floor, arguments.use_ue8m0);

        uint16_t pairs[kElementsPerLane / 2];
#pragma unroll
        for (int i = 0; i < kElementsPerLane; i += 2)
            pairs[i / 2] = ptx::pack_e4m3x2(x[i] * scale.inverse, x[i + 1] * scale.inverse);

        uint8_t* q = arguments.q + (group * arguments.m + row) * arguments.k + column;
        if (kVectorized && count == kElementsPerLane) {
            *reinterpret_cast<uint2*>(q) =
                make_uint2(pairs[0] | uint32_t{pairs[1]} << 16, pairs[2] | uint32_t{pairs[3]} << 16);
        } else {
#pragma unroll
            for (int i = 0; i < kElementsPerLane; ++i) {
                if (i < count) q[i] = static_cast<uint8_t>(pairs[i / 2] >> (8 * (i % 2)));
            }
        }
        if (lane == 0) {
            arguments
                .sf[group * arguments.sf_stride_group + row * arguments.sf_stride_m + k_block * arguments.sf_stride_k] =
                scale.sf;
        }
    }
}

}  // namespace dso
