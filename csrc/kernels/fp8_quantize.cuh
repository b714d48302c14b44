// Quantization to e4m3:   q = e4m3(x * (448 / amax)),   sf = amax / 448,   amax over 1 x 128 or over 128 x 128 elements
//
// per_token_cast_to_fp8
//   x   [groups, m, k]             bf16, f16 or f32, rows contiguous    16-byte loads where rows are aligned for them
//   q   [groups, m, k]             e4m3, contiguous                     8-byte stores
//   sf  [groups, m, ceil(k/128)]   f32, any strides                     one store a block of 128
// per_block_cast_to_fp8
//   x   [groups, n, k]             the same
//   q   [groups, n, k]             the same
//   sf  [groups, ceil(n/128), ceil(k/128)]   f32, contiguous
//
// Work      Per token: a warp takes a patch of 4 rows x 512 columns (1 row where that would leave SMs idle), eight
//           lanes a block; all of a patch is loaded before any of it is used. Lane i of a block's lanes makes the scale
//           of row i. See device/patch.cuh.
//           Per block: a CTA of 512 threads takes a block, 32 elements a thread, kept in registers between the two
//           passes over them.
// Numerics  amax over |x| without NaN; x * inverse rounded once in float32, then to e4m3 (nearest even, saturating).
//           NaN stays NaN. Bit for bit the reference in deepseek_ops/quantize.py.
// Limits    any m, n >= 0, any k < 2^31; blocks at the edges may be smaller. Rows that are not aligned to 16 bytes, or
//           of a k that is no multiple of 8, are loaded and stored one element at a time.
// Source    DeepSeek-V3 report, arXiv:2412.19437, section 3.3.   Launched by launch/fp8_quantize.cu
#pragma once

#include "device/patch.cuh"
#include "kernels/fp8_quantize_arguments.h"
#include "ptx/shared_memory.cuh"
#include "ptx/sync.cuh"

namespace dso {

/// What registers are meant for; of taller patches the compiler chooses well (0). Of one row it would save so many that
/// the second chunk's load waits until the first is used: 64 x 7168 took 2.41 microseconds so, instead of 1.89.
template <int kRows>
inline constexpr int kCastCtasPerSm = kRows == 1 ? 4 : 0;

template <typename T, int kRows, bool kVectorized>
__global__ void __launch_bounds__(kPatchThreads, kCastCtasPerSm<kRows>)
    per_token_cast_to_fp8_kernel(const __grid_constant__ PerTokenCastArguments arguments) {
    const int64_t m = arguments.m, k = arguments.k;
    const uint32_t column = patch_column();
    ptx::grid_dependency_wait();
    ptx::grid_launch_dependents();
    for (int64_t group = blockIdx.z; group < arguments.num_groups; group += gridDim.z) {
        for (int64_t row = patch_row<kRows>(); row < m; row += patch_row_step<kRows>()) {
            Chunk<T> x[kRows][kPatchChunks];
            const T* source = static_cast<const T*>(arguments.x) + group * arguments.x_stride_group +
                              row * arguments.x_stride_m + column;
            load_patch<kRows, kVectorized>(x, source, arguments.x_stride_m, m - row, static_cast<int>(k - column));
            cast_patch<kRows, kVectorized>(x, arguments.output, group, row, column, m, k);
        }
    }
}

inline constexpr int kPerBlockThreads = 512;
/// What registers are meant for: left to itself (0) the compiler saves so many of 16-bit elements' that the last loads
/// wait until the first are used.
template <typename T>
inline constexpr int kPerBlockCtasPerSm = sizeof(T) == 2 ? 2 : 0;
inline constexpr int kThreadsPerRow = kQuantizeBlock / kChunk;
inline constexpr int kRowsAtOnce = kPerBlockThreads / kThreadsPerRow;
inline constexpr int kChunksPerThread = kQuantizeBlock / kRowsAtOnce;

struct CtaMaxima {
    uint32_t of_warp[2][kPerBlockThreads / 32];
};

/// The largest of a value that is not negative over all threads of the CTA, to all of them. The floats' bits are in the
/// same order as they are. Calls take turns with the places in shared memory: one barrier each is enough.
DSO_DEVICE float max_over_cta(float x, uint32_t turn) {
    constexpr uint32_t kNumWarps = kPerBlockThreads / 32;
    auto& of_warp = ptx::static_shared<CtaMaxima>().of_warp[turn % 2];
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t largest = __reduce_max_sync(0xFFFFFFFF, __float_as_uint(x));
    if (lane == 0) of_warp[threadIdx.x / 32] = largest;
    __syncthreads();
    return __uint_as_float(__reduce_max_sync(0xFFFFFFFF, of_warp[lane % kNumWarps]));
}

template <typename T, bool kVectorized>
__global__ void __launch_bounds__(kPerBlockThreads, kPerBlockCtasPerSm<T>)
    per_block_cast_to_fp8_kernel(const __grid_constant__ PerBlockCastArguments arguments) {
    const int64_t n = arguments.n, k = arguments.k;
    const uint32_t row_in_block = threadIdx.x / kThreadsPerRow;
    const uint32_t column = blockIdx.x * kQuantizeBlock + threadIdx.x % kThreadsPerRow * kChunk;
    const int columns_left = static_cast<int>(k - column);
    const int64_t num_blocks = (n + kQuantizeBlock - 1) / kQuantizeBlock;

    // The next kernel is not let go: it may be a GEMM with b_is_constant, which reads these weights without waiting.
    ptx::grid_dependency_wait();
    uint32_t turn = 0;
    for (int64_t group = blockIdx.z; group < arguments.num_groups; group += gridDim.z) {
        for (int64_t block = blockIdx.y; block < num_blocks; block += gridDim.y) {
            const int64_t row = block * kQuantizeBlock + row_in_block;
            const T* source = static_cast<const T*>(arguments.x) + group * arguments.x_stride_group +
                              row * arguments.x_stride_n + column;
            Chunk<T> x[kChunksPerThread];
#pragma unroll
            for (int i = 0; i < kChunksPerThread; ++i)
                x[i] = load_chunk<kVectorized>(source + i * kRowsAtOnce * arguments.x_stride_n,
                                               row + i * kRowsAtOnce < n ? columns_left : 0);

            const float amax = max_over_cta(amax_of(x), turn++);
            const BlockScale scale = block_scale(amax, arguments.amax_floor, arguments.use_ue8m0);

            uint8_t* q = arguments.q + (group * n + row) * k + column;
#pragma unroll
            for (int i = 0; i < kChunksPerThread; ++i)
                store_e4m3<kVectorized>(q + i * kRowsAtOnce * k, cast_chunk(x[i], scale.inverse),
                                        row + i * kRowsAtOnce < n ? columns_left : 0);
            if (threadIdx.x == 0) arguments.sf[(group * num_blocks + block) * gridDim.x + blockIdx.x] = scale.sf;
        }
    }
}

}  // namespace dso
