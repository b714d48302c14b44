#include "ptx/matrix.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstring>

#include "machine.h"

namespace emulator {
namespace {

/// The lanes' addresses of rows of 16 bytes.
const uint32_t* meet_with_rows(const char* name, const void* row, uint32_t num_rows) {
    const uint32_t* rows = meet(name, address_of(row));
    for (uint32_t i = 0; i < num_rows; ++i) {
        if (rows[i] % 16 != 0) fail("%s: lane %u's row at 0x%x is not aligned to 16 bytes", name, i, rows[i]);
    }
    return rows;
}

void store_element(uint32_t row, uint32_t column, uint32_t element, const char* name) {
    const auto narrow = static_cast<uint16_t>(element);
    memcpy(place_of(row + 2 * column, 2, name).bytes, &narrow, 2);
}

}  // namespace
}  // namespace emulator

namespace dso::ptx {

using namespace emulator;

void ldmatrix_x4(uint32_t (&x)[4], const void* row) {
    const char* const name = "ldmatrix.x4";
    const uint32_t* rows = meet_with_rows(name, row, 32);
    const uint32_t lane = current->lane();
    for (uint32_t i = 0; i < 4; ++i) memcpy(&x[i], place_of(rows[8 * i + lane / 4] + 4 * (lane % 4), 4, name).bytes, 4);
}

void ldmatrix_x4_trans(uint32_t (&x)[4], const void* row) {
    const char* const name = "ldmatrix.x4.trans";
    const uint32_t* rows = meet_with_rows(name, row, 32);
    const uint32_t lane = current->lane();
    for (uint32_t i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (uint32_t j = 0; j < 2; ++j)
            memcpy(&pair[j], place_of(rows[8 * i + 2 * (lane % 4) + j] + 2 * (lane / 4), 2, name).bytes, 2);
        x[i] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
}

void stmatrix_x4(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    const char* const name = "stmatrix.x4";
    const uint32_t* rows = meet_with_rows(name, row, 32);
    const uint32_t registers[] = {r0, r1, r2, r3}, lane = current->lane();
    for (uint32_t i = 0; i < 4; ++i) {
        store_element(rows[8 * i + lane / 4], 2 * (lane % 4), registers[i], name);
        store_element(rows[8 * i + lane / 4], 2 * (lane % 4) + 1, registers[i] >> 16, name);
    }
}

void stmatrix_x2_trans(void* column, uint32_t r0, uint32_t r1) {
    const char* const name = "stmatrix.x2.trans";
    const uint32_t* columns = meet_with_rows(name, column, 16);
    const uint32_t registers[] = {r0, r1}, lane = current->lane();
    for (uint32_t i = 0; i < 2; ++i) {
        store_element(columns[8 * i + 2 * (lane % 4)], lane / 4, registers[i], name);
        store_element(columns[8 * i + 2 * (lane % 4) + 1], lane / 4, registers[i] >> 16, name);
    }
}

uint32_t transpose_8x8(uint32_t x) {
    const uint32_t* pairs = meet("movmatrix.trans", x);
    const uint32_t lane = current->lane(), row = lane / 4, column = 2 * (lane % 4);
    const auto element = [&](uint32_t i, uint32_t j) { return pairs[4 * i + j / 2] >> j % 2 * 16 & 0xFFFF; };
    return element(column, row) | element(column + 1, row) << 16;
}

uint32_t pack_bf16x2(float low, float high) {
    const auto narrow = [](float x) -> uint32_t { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); };
    return narrow(low) | narrow(high) << 16;
}

uint32_t pack_f16x2(float low, float high) {
    const auto narrow = [](float x) -> uint32_t { return __half_as_ushort(__float2half_rn(x)); };
    return narrow(low) | narrow(high) << 16;
}

uint32_t pack_f16x2_finite(float low, float high) {
    const auto finite = [](float x) { return std::isnan(x) ? x : std::clamp(x, -65504.f, 65504.f); };
    return pack_f16x2(finite(low), finite(high));
}

float2 unpack_f16x2(uint32_t packed) {
    const auto wide = [](uint32_t x) { return __half2float(__ushort_as_half(static_cast<uint16_t>(x))); };
    return {wide(packed), wide(packed >> 16)};
}

uint16_t pack_e4m3x2(float low, float high) {
    const auto narrow = [](float x) { return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3); };
    return static_cast<uint16_t>(narrow(low) | narrow(high) << 8);
}

uint32_t unpack_e4m3x2(uint16_t packed) {
    const auto wide = [](uint32_t x) -> uint32_t {
        return __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(x), __NV_E4M3).x;
    };
    return wide(packed & 0xFF) | wide(packed >> 8) << 16;
}

void unpack_e4m3x4(uint32_t packed, uint32_t& low, uint32_t& high) {
    const auto wide = [&](uint32_t i) -> uint32_t {
        return __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(packed >> 8 * i), __NV_E4M3).x;
    };
    low = wide(0) | wide(1) << 16;
    high = wide(2) | wide(3) << 16;
}

}  // namespace dso::ptx
