#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

void mma_16x8x16(bool is_bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <HalfType type>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    mma_16x8x16(type == HalfType::kBF16, d, a, b0, b1);
}

}  // namespace dso::ptx
