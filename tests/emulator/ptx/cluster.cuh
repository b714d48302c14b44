#pragma once

#include "ptx/mbarrier.cuh"

namespace dso::ptx {

uint32_t cluster_size();
inline uint32_t cluster_index_x() { return blockIdx.x / cluster_size(); }
inline uint32_t cta_index_y() { return blockIdx.y; }
uint32_t cluster_rank();
void cluster_arrive();
// Writes are seen at once here: that this fence is missing does not show.
inline void fence_release_shared_to_cluster() {}
void cluster_wait();
uint32_t cluster_address(const void* pointer, uint32_t rank);
float4 load_from_cluster(uint32_t address);
void copy_to_cluster_async(uint32_t destination, const void* source, uint32_t num_bytes, uint32_t barrier);

}  // namespace dso::ptx
