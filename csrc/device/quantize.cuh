// A block's scale from its largest magnitude: the rule of deepseek_ops/quantize.py, bit for bit.
#pragma once

#include "ptx/types.cuh"

namespace dso {

inline constexpr float kFp8Max = 448.f;
inline constexpr float kFloatMax = 3.402823466e38f;

/// What one multiplies by to dequantize, and to quantize.
struct BlockScale {
    float sf, inverse;
};

/// `amax` is the block's largest magnitude with NaN left out; infinity counts as the largest float.
DSO_DEVICE BlockScale block_scale(float amax, float amax_floor, bool use_ue8m0) {
    amax = fminf(fmaxf(amax, amax_floor), kFloatMax);
    const float sf = __fdiv_rn(amax, kFp8Max);
    if (!use_ue8m0) return {sf, __fdiv_rn(kFp8Max, amax)};
    // The power of two at or above sf: its exponent, plus one where the mantissa is not zero. amax_floor keeps sf a
    // normal number, and its exponent far from both ends.
    const uint32_t bits = __float_as_uint(sf);
    const uint32_t exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0);
    return {__uint_as_float(exponent << 23), __uint_as_float((254 - exponent) << 23)};
}

}  // namespace dso
