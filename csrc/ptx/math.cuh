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

/// `mul.rn.f16x2`: two products of float16, each rounded; subnormal ones, too.
DSO_DEVICE uint32_t multiply_f16x2(uint32_t x, uint32_t y) {
    uint32_t product;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(x), "r"(y));
    return product;
}

}  // namespace dso::ptx
