// mma.sync: a warp multiplies operands in its registers.
// PTX ISA, section "Warp-level Matrix Instructions".
//
// With g = lane / 4 and c = 2 * (lane % 4), registers of the operands hold two elements each:
//   a [16 rows, 16 of K]: a[0] (g, c), a[1] (g + 8, c), a[2] (g, c + 8), a[3] (g + 8, c + 8), and their right
//   neighbours b [16 of K, 8 columns]: b0 (c, g) and (c + 1, g), b1 (c + 8, g) and (c + 9, g) d [16 rows, 8 columns]:
//   d[0] (g, c), d[1] (g, c + 1), d[2] (g + 8, c), d[3] (g + 8, c + 1)
#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

/// `mma.sync.m16n8k16.f32` of bf16 or f16: d += a @ b.
template <HalfType type>
DSO_DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if constexpr (type == HalfType::kBF16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

}  // namespace dso::ptx
