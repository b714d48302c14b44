#pragma once

#include "ptx/mbarrier.cuh"

namespace dso::ptx {

uint32_t cluster_size();
uint32_t cluster_rank();
void cluster_arrive();
void cluster_wait();
uint32_t cluster_address(const void* pointer, uint32_t rank);
void store_to_cluster_async(uint32_t address, const float (&x)[4], uint32_t barrier);
void copy_to_cluster_async(uint32_t destination, const void* source, uint32_t num_bytes, uint32_t barrier);

}  // namespace dso::ptx
