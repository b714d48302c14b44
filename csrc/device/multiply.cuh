// A step of a GEMM on the tensor core: 64 x N, up to 128 bytes of K, both operands in shared memory.
#pragma once

#include "device/tile.cuh"
#include "ptx/wgmma.cuh"

namespace dso {

/// Starts `partial = a @ b.T` over kDepth of K, from the descriptors of the two tiles. `partial` is not to be touched
/// before `finish_multiply`.
template <int N, int kDepth = kSwizzleBytes>
DSO_DEVICE void start_multiply(float (&partial)[N / 2], uint64_t a, uint64_t b) {
    ptx::keep_in_order(partial);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth; k += 32)
        ptx::WgmmaE4M3<N>::mma(partial, advance_descriptor(a, k), advance_descriptor(b, k), k != 0);
    ptx::wgmma_commit();
    ptx::keep_in_order(partial);
}

/// Whether the last step of K is half a one: what is beyond are zeros, and need not be multiplied.
DSO_DEVICE bool ends_with_half_a_step(int k) {
    return k % kSwizzleBytes != 0 && k % kSwizzleBytes <= kSwizzleBytes / 2;
}

/// Starts `sum += a @ b.T` of bfloat16 over 64 of K, likewise. Steps may follow one another without a wait between.
template <int N>
DSO_DEVICE void start_adding(float (&sum)[N / 2], uint64_t a, uint64_t b) {
    ptx::keep_in_order(sum);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kSwizzleBytes; k += 32)
        ptx::WgmmaHalf<ptx::HalfType::kBF16, N>::mma(sum, advance_descriptor(a, k), advance_descriptor(b, k), true);
    ptx::wgmma_commit();
    ptx::keep_in_order(sum);
}

/// Waits for it.
template <int kCount>
DSO_DEVICE void finish_multiply(float (&partial)[kCount]) {
    ptx::wgmma_wait<0>();
    ptx::keep_in_order(partial);
}

}  // namespace dso
