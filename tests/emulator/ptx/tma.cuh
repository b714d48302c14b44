#pragma once

#include "ptx/mbarrier.cuh"

namespace dso::ptx {

void tma_load_3d(void* destination, const TensorMap* map, uint64_t* barrier, int column, int row, int matrix);
void tma_load_4d(void* destination, const TensorMap* map, uint64_t* barrier, int x0, int x1, int x2, int x3);
void copy_from_global_async(void* destination, const void* source, uint32_t num_bytes, uint64_t* barrier);
void tma_store_3d(const TensorMap* map, const void* source, int column, int row, int matrix);
void tma_store_commit();
void tma_store_wait(size_t num_pending);

template <int kPending>
void tma_store_wait_read() {
    tma_store_wait(kPending);
}

inline void prefetch_tensor_map(const TensorMap*) {}
inline void prefetch_line_to_l2(const void*) {}
void prefetch_to_l2(const void* source, uint32_t num_bytes);
// Writes by threads are seen by TMA and WGMMA at once here: that this fence is missing does not show.
inline void fence_proxy_async_shared() {}

}  // namespace dso::ptx
