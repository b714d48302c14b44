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

/// The least number that float16 has with all its bits.
inline constexpr float kLeastNormalF16 = 1.f / 16384;
/// In units of 1 / 256 smaller scales have all their bits, too; and e4m3 values in units of 256 are exact.
inline constexpr int kSmallScaleUnits = 256;

/// `kUnits` times a scale, twice: kUnits is 1, or kSmallScaleUnits. A scale whose block may not fit into float16 counts
/// as the largest that does.
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

/// Eight e4m3 values in float16 times a scale from `scale_to_f16x2`: the scale is rounded, and the product is. Where
/// the scale is a normal number both units give the same bits.
template <int kUnits>
DSO_DEVICE uint4 multiply_by_scale(uint4 x, uint32_t scale) {
    constexpr uint32_t kUnit = 0x1C00'1C00;  // 2^-8, twice
    uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (uint32_t& pair : pairs) {
        if constexpr (kUnits != 1) pair = ptx::multiply_f16x2(pair, kUnit);
        pair = ptx::multiply_f16x2(pair, scale);
    }
    return {pairs[0], pairs[1], pairs[2], pairs[3]};
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
