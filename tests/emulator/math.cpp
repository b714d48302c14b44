#include "ptx/math.cuh"

#include <cfloat>

#include "ptx/matrix.cuh"

namespace dso::ptx {

float reciprocal(float x) {
    if (std::fabs(x) < FLT_MIN) return std::copysign(HUGE_VALF, x);
    const float y = 1 / x;
    return std::fabs(y) < FLT_MIN ? std::copysign(0.f, y) : y;
}

float exp2(float x) {
    const float y = std::exp2(x);
    return std::fabs(y) < FLT_MIN ? 0.f : y;
}

uint32_t multiply_f16x2(uint32_t x, uint32_t y) {
    const float2 a = unpack_f16x2(x), b = unpack_f16x2(y);
    return pack_f16x2(a.x * b.x, a.y * b.y);
}

}  // namespace dso::ptx
