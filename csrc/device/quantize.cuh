// A block's scale from its largest magnitude: the rule of deepseek_ops/quantize.py, bit for bit.
#pragma once

#include "ptx/math.cuh"

namespace dso {

inline constexpr float kFp8Max = 448.f;
inline constexpr float kFloatMax = 3.402823466e38f;

/// What one multiplies by to dequantize, and to quantize.
struct BlockScale {
    float sf, inverse;
};

/// amax / 448 and 448 / amax as IEEE rounds them, for 1e-30 <= amax <= kFloatMax. The compiler's division first asks
/// whether its operands are near the ends of float's range, and has a subroutine for that; here nothing is.
///
/// The first: 1 / 448 is rounded, `near` is within a unit of the quotient, what remains of amax is exact; so
/// Markstein's theorem rounds their sum right. The second by trial: where nothing overflows or is subnormal only amax's
/// mantissa matters, and tests/host/quantize.cpp tries all, with each reciprocal that is within two units of the best.
/// A sixteenth of amax has a normal reciprocal, and 448 / 16 is exact.
DSO_DEVICE float over_fp8_max(float amax) {
    constexpr float kReciprocal = 1.f / kFp8Max;
    const float near = __fmul_rn(amax, kReciprocal);
    return __fmaf_rn(__fmaf_rn(-kFp8Max, near, amax), kReciprocal, near);
}
DSO_DEVICE float fp8_max_over(float amax) {
    constexpr float kDividend = kFp8Max / 16;
    const float divisor = __fmul_rn(amax, 1.f / 16);
    const float guess = ptx::reciprocal(divisor);
    const float reciprocal = __fmaf_rn(guess, __fmaf_rn(-divisor, guess, 1.f), guess);
    const float near = __fmul_rn(reciprocal, kDividend);
    return __fmaf_rn(reciprocal, __fmaf_rn(-divisor, near, kDividend), near);
}

/// `amax` is the block's largest magnitude with NaN left out; infinity counts as the largest float.
DSO_DEVICE BlockScale block_scale(float amax, float amax_floor, bool use_ue8m0) {
    amax = fminf(fmaxf(amax, amax_floor), kFloatMax);
    const float sf = over_fp8_max(amax);
    if (!use_ue8m0) return {sf, fp8_max_over(amax)};
    // The power of two at or above sf: its exponent, plus one where the mantissa is not zero. amax_floor keeps sf a
    // normal number, and its exponent far from both ends.
    const uint32_t bits = __float_as_uint(sf);
    const uint32_t exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0);
    return {__uint_as_float(exponent << 23), __uint_as_float((254 - exponent) << 23)};
}

}  // namespace dso
