// Arithmetic that CUDA C++ has no exact name for.
#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

/// `rcp.approx.ftz.f32`: 1 / x, within one unit in the last place. Subnormal arguments and results count as zero.
DSO_DEVICE float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// `ex2.approx.ftz.f32`: 2 to the power of x, within two units in the last place.
DSO_DEVICE float exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace dso::ptx
