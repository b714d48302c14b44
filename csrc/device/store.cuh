// Stores of float32 sums to an output that is bfloat16 or float32, overwritten or added to.
#pragma once

#include "device/direct_output.h"
#include "ptx/matrix.cuh"

namespace dso {

/// Two neighbours, the first at an even `offset`.
DSO_DEVICE void store_pair(const DirectOutput& output, int64_t offset, float2 value) {
    if (output.is_bf16) {
        auto* d = reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(output.d) + offset);
        if (output.accumulate) {
            const uint32_t old = *d;
            value.x += __uint_as_float(old << 16);
            value.y += __uint_as_float(old & 0xFFFF0000u);
        }
        *d = ptx::pack_bf16x2(value.x, value.y);
    } else {
        auto* d = reinterpret_cast<float2*>(static_cast<float*>(output.d) + offset);
        if (output.accumulate) {
            const float2 old = *d;
            value.x += old.x;
            value.y += old.y;
        }
        *d = value;
    }
}

/// One element.
DSO_DEVICE void store_element(const DirectOutput& output, int64_t offset, float value) {
    auto* narrow = static_cast<uint16_t*>(output.d) + offset;
    auto* wide = static_cast<float*>(output.d) + offset;
    if (output.accumulate) value += output.is_bf16 ? __uint_as_float(uint32_t{*narrow} << 16) : *wide;
    if (output.is_bf16) {
        *narrow = static_cast<uint16_t>(ptx::pack_bf16x2(value, 0.f));
    } else {
        *wide = value;
    }
}

}  // namespace dso
