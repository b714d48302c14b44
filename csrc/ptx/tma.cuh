// TMA: tiles of tensors between global and shared memory, described by a TensorMap.
// PTX ISA, section "Data Movement and Conversion Instructions: cp.async.bulk.tensor".
#pragma once

#include "ptx/mbarrier.cuh"

namespace dso::ptx {

/// `prefetch.tensormap`: fetches a descriptor ahead of its first use.
DSO_DEVICE void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// `cp.async.bulk.tensor.3d`, global to shared: the box at (`column`, `row`) of matrix `matrix`. What lies outside the
/// tensor arrives as zeros, and counts as bytes all the same. `column` must be at a multiple of 16 bytes.
DSO_DEVICE void tma_load_3d(void* destination, const TensorMap* map, uint64_t* barrier, int column, int row,
                            int matrix) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(smem_addr(destination)),
        "l"(map), "r"(smem_addr(barrier)), "r"(column), "r"(row), "r"(matrix)
        : "memory");
}

/// The same of a tensor of four dimensions; coordinates are those of the innermost first.
DSO_DEVICE void tma_load_4d(void* destination, const TensorMap* map, uint64_t* barrier, int x0, int x1, int x2,
                            int x3) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, "
        "%6}], "
        "[%2];" ::"r"(smem_addr(destination)),
        "l"(map), "r"(smem_addr(barrier)), "r"(x0), "r"(x1), "r"(x2), "r"(x3)
        : "memory");
}

/// `cp.async.bulk`, global to shared: `num_bytes`, a multiple of 16, between addresses that are multiples of 16.
DSO_DEVICE void copy_from_global_async(void* destination, const void* source, uint32_t num_bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     smem_addr(destination)),
                 "l"(source), "r"(num_bytes), "r"(smem_addr(barrier))
                 : "memory");
}

/// `prefetch.global.L2`: asks for the line around `address` to be in L2 soon.
DSO_DEVICE void prefetch_line_to_l2(const void* address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory");
}

/// `cp.async.bulk.prefetch.L2`: asks for `num_bytes` from `source` on, both multiples of 16, to be in L2 soon.
DSO_DEVICE void prefetch_to_l2(const void* source, uint32_t num_bytes) {
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(source), "r"(num_bytes) : "memory");
}

/// `cp.async.bulk.tensor.3d`, shared to global. What lies outside the tensor is not written.
DSO_DEVICE void tma_store_3d(const TensorMap* map, const void* source, int column, int row, int matrix) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                 "r"(smem_addr(source)), "r"(column), "r"(row), "r"(matrix)
                 : "memory");
}

/// `cp.async.bulk.commit_group`: closes the group of the stores that this thread issued.
DSO_DEVICE void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

/// `cp.async.bulk.wait_group.read`: until at most `kPending` of this thread's groups still read shared memory.
template <int kPending>
DSO_DEVICE void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

/// `fence.proxy.async`: orders this thread's ordinary accesses to shared memory before later ones of TMA and WGMMA:
/// its writes before their reads, and its reads before TMA's writes.
DSO_DEVICE void fence_proxy_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace dso::ptx
