// SwiGLU's elementwise half:   y = T(silu(gate) * up),   silu(g) = g / (1 + exp(-g));   or q, sf = that y quantized
//
//   x   [groups, m, 2d]           bf16, f16 or f32, rows contiguous, gate first   16-byte loads of aligned rows
//   y   [groups, m, d]            the type of x, contiguous                       16-byte stores
//   q   [groups, m, d]            e4m3, contiguous                                8-byte stores
//   sf  [groups, m, ceil(d/128)]  f32, any strides                                one store a block of 128
//
// Work      A warp takes a patch of 2 rows x 512 columns of the output (1 row where that would leave SMs idle), loads
//           both halves of it, and quantizes as per_token_cast_to_fp8 does. See device/patch.cuh.
// Numerics  float32; the product is rounded to T, and only then quantized: the bits of the two ops one after the other.
//           The reciprocal is the hardware's (1 unit in the last place), see silu below.
// Limits    any m, d >= 0, d < 2^30; rows that are not aligned are taken one element at a time.
// Source    Shazeer, arXiv:2002.05202, equation 6.   Launched by launch/silu_mul.cu
#pragma once

#include "device/patch.cuh"
#include "kernels/silu_mul_arguments.h"
#include "ptx/math.cuh"
#include "ptx/sync.cuh"

namespace dso {

/// What registers are meant for: with fewer, the compiler would load the second half of a patch after the first is
/// used.
inline constexpr int kSiluMulCtasPerSm = 4;

/// g / (1 + exp(-g)) as g * (1 / ((1 + exp(-g)) / 4) / 4): the quarter keeps the reciprocal of the largest float above
/// float32's subnormals, which the hardware's reciprocal would flush.
DSO_DEVICE float silu(float gate) { return gate * (0.25f * ptx::reciprocal(__fmaf_rn(0.25f, expf(-gate), 0.25f))); }

template <typename T, bool kCast, int kRows, bool kVectorized>
__global__ void __launch_bounds__(kPatchThreads, kSiluMulCtasPerSm)
    silu_mul_kernel(const __grid_constant__ SiluMulArguments arguments) {
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    const int64_t m = arguments.m, d = arguments.d;
    const uint32_t column = patch_column();
    const int columns_left = static_cast<int>(d - column);
    for (int64_t group = blockIdx.z; group < arguments.num_groups; group += gridDim.z) {
        for (int64_t row = patch_row<kRows>(); row < m; row += patch_row_step<kRows>()) {
            Chunk<T> gates[kRows][kPatchChunks], ups[kRows][kPatchChunks];
            const T* source = static_cast<const T*>(arguments.x) + group * arguments.x_stride_group +
                              row * arguments.x_stride_m + column;
            load_patch<kRows, kVectorized>(gates, source, arguments.x_stride_m, m - row, columns_left);
            load_patch<kRows, kVectorized>(ups, source + d, arguments.x_stride_m, m - row, columns_left);

#pragma unroll
            for (int r = 0; r < kRows; ++r) {
#pragma unroll
                for (int i = 0; i < kPatchChunks; ++i) {
                    float gate[kChunk], up[kChunk];
                    to_floats(gates[r][i], gate);
                    to_floats(ups[r][i], up);
#pragma unroll
                    for (int j = 0; j < kChunk; ++j) gate[j] = silu(gate[j]) * up[j];
                    gates[r][i] = round_to<T>(gate);
                }
            }
            if constexpr (kCast) {
                cast_patch<kRows, kVectorized>(gates, arguments.output, group, row, column, m, d);
            } else {
                T* y = static_cast<T*>(arguments.y) + (group * m + row) * d + column;
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
#pragma unroll
                    for (int i = 0; i < kPatchChunks; ++i)
                        store_chunk<kVectorized>(y + r * d + i * kPatchChunkStep, gates[r][i],
                                                 row + r < m ? columns_left - i * kPatchChunkStep : 0);
                }
            }
        }
    }
}

}  // namespace dso
