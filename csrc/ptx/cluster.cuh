// Clusters of CTAs: their barrier, and each other's shared memory.
// PTX ISA, sections "Parallel Synchronization and Communication Instructions: barrier.cluster" and "mapa".
#pragma once

#include "ptx/mbarrier.cuh"

namespace dso::ptx {

/// `%clusterid.x`: this cluster's place in the grid, or the CTA's where the launch named no cluster. Read anew by each
/// call, as are those below: that is cheaper than a register.
DSO_DEVICE uint32_t cluster_index_x() {
    uint32_t index;
    asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(index));
    return index;
}

/// `%ctaid.y`.
DSO_DEVICE uint32_t cta_index_y() {
    uint32_t index;
    asm volatile("mov.u32 %0, %%ctaid.y;" : "=r"(index));
    return index;
}

/// `%cluster_nctarank`: the number of CTAs in this cluster; 1 where the launch named no cluster.
DSO_DEVICE uint32_t cluster_size() {
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

/// `%cluster_ctarank`: this CTA's place in its cluster.
DSO_DEVICE uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

/// `barrier.cluster.arrive.relaxed`: this thread is here. Orders no memory but what a fence before it does: the form
/// that releases also waits for all earlier global writes, which takes a microsecond.
DSO_DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }

/// `fence.release.sync_restrict`: what this thread, and those that it has waited for, wrote to the CTA's shared memory
/// is seen by those of the cluster that it lets go by arriving afterwards. Does not wait for global memory.
DSO_DEVICE void fence_release_shared_to_cluster() {
    asm volatile("fence.release.sync_restrict::shared::cta.cluster;" ::: "memory");
}

/// `barrier.cluster.wait`: until every thread of the cluster that still runs has arrived.
DSO_DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

/// `mapa`: the address of `pointer`, which is into this CTA's shared memory, in that of CTA `rank`.
DSO_DEVICE uint32_t cluster_address(const void* pointer, uint32_t rank) {
    uint32_t address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(smem_addr(pointer)), "r"(rank));
    return address;
}

/// `ld.shared::cluster`: 16 bytes from an address from `cluster_address`.
DSO_DEVICE float4 load_from_cluster(uint32_t address) {
    float4 x;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

/// `cp.async.bulk`: `num_bytes`, a multiple of 16, from this CTA's shared memory to an address from `cluster_address`.
/// They are counted by `barrier`, which is in the same CTA's shared memory, when they are there. An illegal instruction
/// where the launch named no cluster, even to the CTA itself.
DSO_DEVICE void copy_to_cluster_async(uint32_t destination, const void* source, uint32_t num_bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     destination),
                 "r"(smem_addr(source)), "r"(num_bytes), "r"(barrier)
                 : "memory");
}

}  // namespace dso::ptx
