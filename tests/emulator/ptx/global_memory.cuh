#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

void wait_for_release(const uint64_t* address, uint64_t value);
void store_release(uint64_t* address, uint64_t value);

}  // namespace dso::ptx
