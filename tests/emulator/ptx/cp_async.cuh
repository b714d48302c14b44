#pragma once

#include "ptx/mbarrier.cuh"

namespace dso::ptx {

void cp_async_4(void* destination, const void* source, bool valid);
void cp_async_16(void* destination, const void* source, bool valid);
void cp_async_mbarrier_arrive(uint64_t* barrier);

}  // namespace dso::ptx
