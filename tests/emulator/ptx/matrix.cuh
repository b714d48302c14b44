#pragma once

#include "ptx/mbarrier.cuh"

namespace dso::ptx {

void ldmatrix_x4(uint32_t (&x)[4], const void* row);
void ldmatrix_x4_trans(uint32_t (&x)[4], const void* row);
void stmatrix_x4(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3);
void stmatrix_x2_trans(void* column, uint32_t r0, uint32_t r1);
uint32_t transpose_8x8(uint32_t x);
uint32_t pack_bf16x2(float low, float high);
uint32_t pack_f16x2(float low, float high);
uint32_t pack_f16x2_finite(float low, float high);
float2 unpack_f16x2(uint32_t packed);
uint16_t pack_e4m3x2(float low, float high);
uint32_t unpack_e4m3x2(uint16_t packed);
void unpack_e4m3x4(uint32_t packed, uint32_t& low, uint32_t& high);

}  // namespace dso::ptx
