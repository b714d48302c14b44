#include "ptx/math.cuh"

#include <cfloat>

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

}  // namespace dso::ptx
