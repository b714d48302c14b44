#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

float reciprocal(float x);

}  // namespace dso::ptx
