// The divisions of device/quantize.cuh, bit for bit IEEE's: of every mantissa, and from the smallest amax_floor to the
// largest float, whichever way the hardware's reciprocal errs.
#include "device/quantize.cuh"

#include <initializer_list>

#include "expect.h"

namespace {

constexpr float kSmallest = 1e-30f;
constexpr uint32_t kMantissas = 1u << 23;

void divide(uint32_t exponent, uint32_t mantissa) {
    const float amax = __uint_as_float(exponent << 23 | mantissa);
    if (amax < kSmallest) return;
    const dso::BlockScale scale = dso::block_scale(amax, kSmallest, false);
    EXPECT(scale.sf == amax / dso::kFp8Max, "%a / 448 is %a, not %a", amax, amax / dso::kFp8Max, scale.sf);
    EXPECT(scale.inverse == dso::kFp8Max / amax, "448 / %a is %a, not %a, with a reciprocal off by %d", amax,
           dso::kFp8Max / amax, scale.inverse, dso::ptx::reciprocal_error);
}

}  // namespace

int main() {
    const uint32_t first = __float_as_uint(kSmallest) >> 23, last = __float_as_uint(dso::kFloatMax) >> 23;
    for (int error = -2; error <= 2; ++error) {
        dso::ptx::reciprocal_error = error;
        for (const uint32_t exponent : {first, 127u, last})
            for (uint32_t mantissa = 0; mantissa < kMantissas; ++mantissa) divide(exponent, mantissa);
        for (uint32_t exponent = first; exponent <= last; ++exponent)
            for (uint32_t mantissa = 0; mantissa < kMantissas; mantissa += 8191) divide(exponent, mantissa);
    }
    std::printf("%lld checks\n", num_checked);
}
