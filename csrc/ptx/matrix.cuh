// ldmatrix, stmatrix and conversions between float32 and the narrow types.
#pragma once

#include "ptx/mbarrier.cuh"

namespace dso::ptx {

/// `ldmatrix.x4`: loads four 8 x 8 matrices of 16-bit elements; addresses and registers are those of `stmatrix_x4`.
DSO_DEVICE void ldmatrix_x4(uint32_t (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(smem_addr(row))
                 : "memory");
}

/// `ldmatrix.x4.trans`: the same of their transposes: register `j` holds elements (2 * (lane % 4), lane / 4) and the
/// one below it of matrix `j`.
DSO_DEVICE void ldmatrix_x4_trans(uint32_t (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(smem_addr(row))
                 : "memory");
}

/// `stmatrix.x4`: stores four 8 x 8 matrices of 16-bit elements; lane `i` gives the address of row `i % 8` of matrix
/// `i / 8`, and register `j` of a lane holds elements (lane / 4, 2 * (lane % 4)) and its right neighbour of matrix `j`.
DSO_DEVICE void stmatrix_x4(void* row, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem_addr(row)), "r"(r0),
                 "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
}

/// `stmatrix.x2.trans`: stores two 8 x 8 matrices transposed; lane `i` of the first 16 gives the address of column
/// `i % 8` of matrix `i / 8`.
DSO_DEVICE void stmatrix_x2_trans(void* column, uint32_t r0, uint32_t r1) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(smem_addr(column)), "r"(r0),
                 "r"(r1)
                 : "memory");
}

/// `movmatrix.trans`: an 8 x 8 matrix of 16-bit elements that lies in the warp's registers as `stmatrix_x4` takes it,
/// transposed: a lane gets elements (2 * (lane % 4), lane / 4) and the one below it.
DSO_DEVICE uint32_t transpose_8x8(uint32_t x) {
    uint32_t transposed;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(x));
    return transposed;
}

/// `cvt.rn.bf16x2.f32`: two floats to bfloat16, `low` in the lower half.
DSO_DEVICE uint32_t pack_bf16x2(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

/// `cvt.rn.f16x2.f32`: two floats to float16, `low` in the lower half. What is too large becomes infinite.
DSO_DEVICE uint32_t pack_f16x2(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

/// The same, but what is too large becomes 65504. NaN stays NaN.
DSO_DEVICE uint32_t pack_f16x2_finite(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

/// `cvt.f32.f16`, twice: what `pack_f16x2` packed.
DSO_DEVICE float2 unpack_f16x2(uint32_t packed) {
    float2 x;
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}\n"
        : "=f"(x.x), "=f"(x.y)
        : "r"(packed));
    return x;
}

/// `cvt.rn.satfinite.e4m3x2.f32`: two floats to e4m3, saturating at 448, `low` in the lower byte. NaN stays NaN.
DSO_DEVICE uint16_t pack_e4m3x2(float low, float high) {
    uint16_t packed;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(packed) : "f"(high), "f"(low));
    return packed;
}

/// `cvt.rn.f16x2.e4m3x2`: what `pack_e4m3x2` packed, as float16, which holds every e4m3 value; `low` in the lower half.
DSO_DEVICE uint32_t unpack_e4m3x2(uint16_t packed) {
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(packed));
    return halves;
}

/// `cvt.rn.f16x2.e4m3x2`, twice: the two lower bytes and the two upper ones to float16, exactly.
DSO_DEVICE void unpack_e4m3x4(uint32_t packed, uint32_t& low, uint32_t& high) {
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}\n"
        : "=r"(low), "=r"(high)
        : "r"(packed));
}

}  // namespace dso::ptx
