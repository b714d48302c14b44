// The 16-bit types of products as a template parameter; and what is multiplied as float16 whatever its type.
#pragma once

#include "ptx/math.cuh"
#include "ptx/matrix.cuh"

namespace dso {

template <ptx::HalfType type>
DSO_DEVICE uint32_t pack_half(float low, float high) {
    return type == ptx::HalfType::kBF16 ? ptx::pack_bf16x2(low, high) : ptx::pack_f16x2(low, high);
}

template <ptx::HalfType type>
DSO_DEVICE float2 unpack_half(uint32_t pair) {
    if constexpr (type == ptx::HalfType::kBF16) {
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
    } else {
        return ptx::unpack_f16x2(pair);
    }
}

/// The least number that float16 has with all its bits. Products with a scale that is smaller would be less exact.
inline constexpr float kLeastNormalF16 = 1.f / 16384;
/// Where a small scale is multiplied by this much, it is exact enough, and so are e4m3 values that are divided by it.
inline constexpr int kSmallScaleUnits = 256;

/// `kUnits` times a scale, twice. One whose block may not fit into float16 counts as the largest that does.
template <int kUnits>
DSO_DEVICE uint32_t scale_to_f16x2(float scale) {
    constexpr float kLargest = 146.125f;  // a float16 times 256, and 448 of it are one: 65504 / 448 would be rounded up
    const float factor = (scale > kLargest ? kLargest : scale) * kUnits;  // NaN stays NaN
    return ptx::pack_f16x2(factor, factor);
}

/// Eight e4m3 values in float16, which has them all.
DSO_DEVICE uint4 e4m3_to_f16(uint2 bytes) {
    uint4 pairs;
    ptx::unpack_e4m3x4(bytes.x, pairs.x, pairs.y);
    ptx::unpack_e4m3x4(bytes.y, pairs.z, pairs.w);
    return pairs;
}

/// Eight values of float16 times one.
DSO_DEVICE uint4 multiply_f16(uint4 x, uint32_t factor) {
    return {ptx::multiply_f16x2(x.x, factor), ptx::multiply_f16x2(x.y, factor), ptx::multiply_f16x2(x.z, factor),
            ptx::multiply_f16x2(x.w, factor)};
}

/// Eight e4m3 values times a scale, in float16: the scale is rounded, and the product is.
DSO_DEVICE uint4 dequantize(uint2 bytes, uint32_t scale) { return multiply_f16(e4m3_to_f16(bytes), scale); }

/// The same, bit for bit, of a scale in units of 1 / kSmallScaleUnits, which may be small.
DSO_DEVICE uint4 dequantize_small(uint2 bytes, uint32_t scale) {
    constexpr uint32_t kUnit = 0x1C00'1C00;  // 2^-8, twice: exact, whatever the e4m3 value
    return multiply_f16(multiply_f16(e4m3_to_f16(bytes), kUnit), scale);
}

/// Eight bfloat16 values as float16, at most 65504.
DSO_DEVICE uint4 bf16_to_f16(uint4 values) {
    uint32_t pairs[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
    for (uint32_t& pair : pairs) {
        const float2 x = unpack_half<ptx::HalfType::kBF16>(pair);
        pair = ptx::pack_f16x2_finite(x.x, x.y);
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

}  // namespace dso
