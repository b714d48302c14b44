// Stores of float32 sums to an output that is bfloat16 or float32, overwritten or added to.
#pragma once

#include "device/direct_output.h"
#include "ptx/matrix.cuh"

namespace dso {

DSO_DEVICE void add_quad(float* sum, float4 x) {
    sum[0] += x.x;
    sum[1] += x.y;
    sum[2] += x.z;
    sum[3] += x.w;
}

DSO_DEVICE float2 unpack_bf16x2(uint32_t x) { return {__uint_as_float(x << 16), __uint_as_float(x & 0xFFFF0000u)}; }

/// Eight neighbours, the first at an `offset` that is a multiple of eight.
DSO_DEVICE void store_octet(const DirectOutput& output, int64_t offset, float (&x)[8]) {
    if (output.is_bf16) {
        auto* d = reinterpret_cast<uint4*>(static_cast<uint16_t*>(output.d) + offset);
        if (output.accumulate) {
            const uint4 old = *d;
            const float2 pairs[4] = {unpack_bf16x2(old.x), unpack_bf16x2(old.y), unpack_bf16x2(old.z),
                                     unpack_bf16x2(old.w)};
#pragma unroll
            for (int i = 0; i < 4; ++i) x[2 * i] += pairs[i].x, x[2 * i + 1] += pairs[i].y;
        }
        *d = {ptx::pack_bf16x2(x[0], x[1]), ptx::pack_bf16x2(x[2], x[3]), ptx::pack_bf16x2(x[4], x[5]),
              ptx::pack_bf16x2(x[6], x[7])};
    } else {
        auto* d = reinterpret_cast<float4*>(static_cast<float*>(output.d) + offset);
        if (output.accumulate) {
            const float4 left = d[0], right = d[1];
            add_quad(x, left);
            add_quad(x + 4, right);
        }
        d[0] = {x[0], x[1], x[2], x[3]};
        d[1] = {x[4], x[5], x[6], x[7]};
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
