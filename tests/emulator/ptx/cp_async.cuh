#pragma once

#include "ptx/mbarrier.cuh"

namespace dso::ptx {

void cp_async_4(void* destination, const void* source, bool valid);
void cp_async_16(void* destination, const void* source, bool valid);
void cp_async_mbarrier_arrive(uint64_t* barrier);
void cp_async_commit();
void cp_async_wait_for_all_but(size_t num_pending);

template <int kPending>
void cp_async_wait() {
    cp_async_wait_for_all_but(kPending);
}

}  // namespace dso::ptx
