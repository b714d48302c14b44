// The GEMM and the quantization on host memory, in plain loops: for NumPy arrays, and as an oracle beside torch.
#include <cmath>
#include <cstring>
#include <limits>

#include "device/math.cuh"
#include "launch/fp8_gemm_checks.h"
#include "launch/fp8_quantize_checks.h"

namespace dso {
namespace {

constexpr int64_t kBlock = 128;
constexpr float kFp8Max = 448.f;

float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
}

uint32_t to_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
}

float bf16_to_float(uint16_t bits) { return from_bits(uint32_t{bits} << 16); }

uint16_t float_to_bf16(float value) {
    if (std::isnan(value)) return 0x7FFF;
    const uint32_t bits = to_bits(value);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

float f16_to_float(uint16_t bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float magnitude;
    if (exponent == 31) {
        magnitude = mantissa ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
    } else {
        magnitude = exponent ? std::ldexp(1024.f + mantissa, exponent - 25) : std::ldexp(float(mantissa), -24);
    }
    return bits & 0x8000 ? -magnitude : magnitude;
}

// e4m3: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, NaN is all ones.
float e4m3_to_float(uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    float magnitude;
    if ((bits & 0x7F) == 0x7F) {
        magnitude = std::numeric_limits<float>::quiet_NaN();
    } else {
        magnitude = exponent ? std::ldexp(8.f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
    }
    return bits & 0x80 ? -magnitude : magnitude;
}

uint8_t float_to_e4m3(float value) {
    const uint8_t sign = std::signbit(value) ? 0x80 : 0;
    if (std::isnan(value)) return sign | 0x7F;
    const float magnitude = std::fmin(std::fabs(value), kFp8Max);
    if (magnitude == 0) return sign;
    int exponent;
    std::frexp(magnitude, &exponent);                        // magnitude is in [2^(exponent - 1), 2^exponent)
    const int unit = exponent - 4 < -9 ? -9 : exponent - 4;  // the last bit's weight: 2^-9 below the normals
    const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -unit)));  // ties to even
    // `steps` counts units; with 8 to 15 of them it is the mantissa with its leading one, and 16 carries by itself.
    return sign | static_cast<uint8_t>(unit == -9 ? steps : (unit + 9) * 8 + steps);
}

float load(const void* x, int64_t i, dso_dtype dtype) {
    switch (dtype) {
        case DSO_BF16:
            return bf16_to_float(static_cast<const uint16_t*>(x)[i]);
        case DSO_F16:
            return f16_to_float(static_cast<const uint16_t*>(x)[i]);
        default:
            return static_cast<const float*>(x)[i];
    }
}

struct Scale {
    float sf, inverse;
};

Scale block_scale(float amax, float amax_floor, bool use_ue8m0) {
    amax = std::fmin(std::fmax(amax, amax_floor), std::numeric_limits<float>::max());
    if (!use_ue8m0) return {amax / kFp8Max, kFp8Max / amax};
    int exponent;
    const float mantissa = std::frexp(amax / kFp8Max, &exponent);  // in [0.5, 1)
    if (mantissa == 0.5f) --exponent;
    return {std::ldexp(1.f, exponent), std::ldexp(1.f, -exponent)};
}

void quantize_block(const dso_per_token_cast& cast, int64_t group, int64_t row, int64_t k_block) {
    const int64_t first = k_block * kBlock, last = first + kBlock < cast.k ? first + kBlock : cast.k;
    const int64_t source = group * cast.x_stride_group + row * cast.x_stride_m;
    float amax = 0;
    for (int64_t i = first; i < last; ++i) amax = std::fmax(amax, std::fabs(load(cast.x, source + i, cast.x_dtype)));
    const Scale scale = block_scale(amax, cast.amax_floor, cast.use_ue8m0 != 0);
    auto* q = static_cast<uint8_t*>(cast.q) + (group * cast.m + row) * cast.k;
    for (int64_t i = first; i < last; ++i) q[i] = float_to_e4m3(load(cast.x, source + i, cast.x_dtype) * scale.inverse);
    cast.sf[group * cast.sf_stride_group + row * cast.sf_stride_m + k_block * cast.sf_stride_k] = scale.sf;
}

/// One element, with the kernel's order of additions: 128 of k at a time, each sum scaled before it is added.
float gemm_element(const dso_fp8_gemm& gemm, int64_t i, int64_t j) {
    const auto* a = static_cast<const uint8_t*>(gemm.a) + i * gemm.a_stride;
    const auto* b = static_cast<const uint8_t*>(gemm.b) + j * gemm.b_stride;
    float sum = 0;
    for (int64_t first = 0; first < gemm.k; first += kBlock) {
        float partial = 0;
        for (int64_t l = first; l < gemm.k && l < first + kBlock; ++l)
            partial += e4m3_to_float(a[l]) * e4m3_to_float(b[l]);
        const int64_t block = first / kBlock;
        sum += partial * (gemm.sfa[i * gemm.sfa_stride_m + block * gemm.sfa_stride_k] *
                          gemm.sfb[j / kBlock * gemm.sfb_stride_n + block * gemm.sfb_stride_k]);
    }
    return sum;
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_per_token_cast_to_fp8_host(const dso_per_token_cast* cast) {
    const dso_status status = dso::check_per_token_cast(*cast);
    if (status != DSO_OK) return status;
    for (int64_t group = 0; group < cast->num_groups; ++group)
        for (int64_t row = 0; row < cast->m; ++row)
            for (int64_t k_block = 0; k_block < dso::ceil_div<int64_t>(cast->k, dso::kBlock); ++k_block)
                dso::quantize_block(*cast, group, row, k_block);
    return DSO_OK;
}

extern "C" dso_status dso_fp8_gemm_nt_host(const dso_fp8_gemm* gemm) {
    const dso_status status = dso::check_fp8_gemm(*gemm);
    if (status != DSO_OK) return status;
    for (int64_t i = 0; i < gemm->m; ++i) {
        for (int64_t j = 0; j < gemm->n; ++j) {
            const int64_t at = i * gemm->d_stride + j;
            const float value = dso::gemm_element(*gemm, i, j);
            if (gemm->d_dtype == DSO_BF16) {
                auto* d = static_cast<uint16_t*>(gemm->d) + at;
                *d = dso::float_to_bf16(gemm->accumulate ? dso::bf16_to_float(*d) + value : value);
            } else {
                auto* d = static_cast<float*>(gemm->d) + at;
                *d = gemm->accumulate ? *d + value : value;
            }
        }
    }
    return DSO_OK;
}
