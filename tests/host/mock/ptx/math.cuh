// A host stand-in for csrc/ptx/math.cuh: the hardware's reciprocal, whose error the test chooses, and what device code
// calls IEEE's arithmetic and bits by.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define DSO_DEVICE inline

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
}
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }

namespace dso::ptx {

inline int reciprocal_error = 0;  // in units in the last place

inline float reciprocal(float x) { return __uint_as_float(__float_as_uint(1.f / x) + reciprocal_error); }

}  // namespace dso::ptx
