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

/// A scale as `dequantize` takes it: twice, times 2^8, so that those of small blocks are normal numbers. One whose
/// block may not fit counts as the largest that does.
DSO_DEVICE uint32_t scale_to_f16x2(float scale) {
    constexpr float kLargest = 146.125f;  // a float16 times 256, and 448 of it are one: 65504 / 448 would be rounded up
    const float factor = (scale > kLargest ? kLargest : scale) * 256.f;  // NaN stays NaN
    return ptx::pack_f16x2(factor, factor);
}

/// Eight e4m3 values in float16, which has them all.
DSO_DEVICE uint4 e4m3_to_f16(uint2 bytes) {
    uint4 pairs;
    ptx::unpack_e4m3x4(bytes.x, pairs.x, pairs.y);
    ptx::unpack_e4m3x4(bytes.y, pairs.z, pairs.w);
    return pairs;
}

/// Two e4m3 values in float16, each times a scale from `scale_to_f16x2`.
DSO_DEVICE uint32_t multiply_by_scale(uint32_t pair, uint32_t scales) {
    constexpr uint32_t kInverse = 0x1C00'1C00;  // 2^-8, twice: exact, whatever the e4m3 value
    return ptx::multiply_f16x2(ptx::multiply_f16x2(pair, kInverse), scales);
}

/// Eight e4m3 values times a scale, in float16: the scale is rounded, and the product is.
DSO_DEVICE uint4 dequantize(uint2 bytes, uint32_t scale) {
    const uint4 exact = e4m3_to_f16(bytes);
    return {multiply_by_scale(exact.x, scale), multiply_by_scale(exact.y, scale), multiply_by_scale(exact.z, scale),
            multiply_by_scale(exact.w, scale)};
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
