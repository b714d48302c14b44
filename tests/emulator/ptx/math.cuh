#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

float reciprocal(float x);
float exp2(float x);
uint32_t multiply_f16x2(uint32_t x, uint32_t y);

}  // namespace dso::ptx
