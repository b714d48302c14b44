// One small kernel around each building block of csrc/ptx and csrc/device; tests/device/test_building_blocks.py says
// what each must compute.
#include "device/math.cuh"
#include "device/pipeline.cuh"
#include "device/promote.cuh"
#include "device/quantize.cuh"
#include "device/tile.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/matrix.cuh"
#include "ptx/sync.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

using namespace dso;

/// d[64, N] = a[64, 128] @ b[N, 128].T on one warpgroup: the swizzle, the descriptors and the accumulator's layout.
template <int N>
__device__ void multiply_tile(const uint8_t* a, const uint8_t* b, float* d) {
    __shared__ alignas(kSwizzleAtomBytes) uint8_t tile_a[64 * 128];
    __shared__ alignas(kSwizzleAtomBytes) uint8_t tile_b[N * 128];
    for (int chunk = threadIdx.x; chunk < 64 * 8; chunk += 128)
        *reinterpret_cast<uint4*>(tile_a + swizzled_offset(chunk / 8, chunk % 8)) =
            reinterpret_cast<const uint4*>(a)[chunk];
    for (int chunk = threadIdx.x; chunk < N * 8; chunk += 128)
        *reinterpret_cast<uint4*>(tile_b + swizzled_offset(chunk / 8, chunk % 8)) =
            reinterpret_cast<const uint4*>(b)[chunk];
    ptx::fence_proxy_async_shared();
    __syncthreads();

    float partial[N / 2], sum[N / 2] = {};
    const uint64_t descriptor_a = wgmma_descriptor(tile_a), descriptor_b = wgmma_descriptor(tile_b);
    ptx::keep_in_order(partial);
    ptx::wgmma_fence();
    for (int k = 0; k < 128; k += 32)
        ptx::WgmmaE4M3<N>::mma(partial, advance_descriptor(descriptor_a, k), advance_descriptor(descriptor_b, k),
                               k != 0);
    ptx::wgmma_commit();
    ptx::keep_in_order(partial);
    ptx::wgmma_wait<0>();
    ptx::keep_in_order(partial);
    promote(sum, partial, 2.f, 4.f);  // rows of the upper and of the lower half of a warp's 16

    for (int i = 0; i < N / 2; ++i) {
        const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * (i / 2 % 2);
        const int column = i / 4 * 8 + threadIdx.x % 4 * 2 + i % 2;
        d[row * N + column] = sum[i];
    }
}

extern "C" __global__ void multiply_64x64(const uint8_t* a, const uint8_t* b, float* d) { multiply_tile<64>(a, b, d); }
extern "C" __global__ void multiply_64x128(const uint8_t* a, const uint8_t* b, float* d) {
    multiply_tile<128>(a, b, d);
}

/// Copies num_blocks blocks of 32 floats through a ring of three stages: warp 0 produces, warp 1 consumes.
extern "C" __global__ void copy_through_pipeline(const float* source, float* destination, int num_blocks) {
    constexpr int kNumStages = 3;
    __shared__ float stages[kNumStages][32];
    __shared__ Pipeline<kNumStages> pipeline;
    if (threadIdx.x == 0) pipeline.init(32, 1);
    __syncthreads();
    Pipeline<kNumStages>::State state;
    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        for (int block = 0; block < num_blocks; ++block, state.advance()) {
            pipeline.acquire(state);
            ptx::cp_async_4(&stages[state.stage][lane], source + block * 32 + lane, lane < 31);
            ptx::cp_async_mbarrier_arrive(&pipeline.full[state.stage]);
        }
    } else {
        for (int block = 0; block < num_blocks; ++block, state.advance()) {
            pipeline.wait(state);
            destination[block * 32 + lane] = stages[state.stage][lane];
            __syncwarp();
            if (lane == 0) pipeline.release(state);
        }
    }
}

/// scales[i] = sf, inverse of a block whose largest magnitude is amax[i].
extern "C" __global__ void scale_blocks(const float* amax, float2* scales, int count, float floor, int use_ue8m0) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const BlockScale scale = block_scale(amax[i], floor, use_ue8m0 != 0);
    scales[i] = make_float2(scale.sf, scale.inverse);
}

/// Both halves of each pair hold the e4m3 of x[i].
extern "C" __global__ void convert_to_e4m3(const float* x, uint16_t* pairs, int count) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) pairs[i] = ptx::pack_e4m3x2(x[i], x[i]);
}

/// An 8 x 8 tile of 0, 1, 2, ... transposed.
extern "C" __global__ void transpose_matrix(uint16_t* tile) {
    const int first = threadIdx.x / 4 * 8 + threadIdx.x % 4 * 2;
    const uint32_t pair = ptx::transpose_8x8(uint32_t(first) | uint32_t(first + 1) << 16);
    tile[first] = uint16_t(pair), tile[first + 1] = uint16_t(pair >> 16);
}

/// A 16 x 16 tile of 0, 1, 2, ... through stmatrix: lane l holds what a WGMMA accumulator would.
extern "C" __global__ void store_matrix(uint16_t* tile) {
    __shared__ alignas(16) uint16_t shared[16 * 16];
    const int lane = threadIdx.x, row = lane / 4, column = lane % 4 * 2;
    const auto pair = [](int r, int c) { return uint32_t(r * 16 + c) | uint32_t(r * 16 + c + 1) << 16; };
    ptx::stmatrix_x4(&shared[lane % 16 * 16 + lane / 16 * 8], pair(row, column), pair(row + 8, column),
                     pair(row, column + 8), pair(row + 8, column + 8));
    __syncwarp();
    for (int i = lane; i < 256; i += 32) tile[i] = shared[i];
}
