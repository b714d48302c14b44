#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

float reciprocal(float x);
float exp2(float x);

}  // namespace dso::ptx
