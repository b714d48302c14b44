// WGMMA: a warpgroup multiplies a 64-row tile with an N-row tile in shared memory, into registers.
// PTX ISA, section "Asynchronous Warpgroup Level Matrix Instructions".
//
// Accumulator of m64nN, thread t of the warpgroup: register 4 * j + 2 * h + i is element
//   row = 16 * (t / 32) + (t % 32) / 4 + 8 * h,   column = 8 * j + 2 * (t % 4) + i.
#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

/// `wgmma.fence`: before the first WGMMA, and whenever registers that it reads or writes were touched.
DSO_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

/// `wgmma.commit_group`: closes the group of the WGMMAs issued so far.
DSO_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

/// `wgmma.wait_group`: until at most `kPending` groups are still running.
template <int kPending>
DSO_DEVICE void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Keeps the compiler from moving reads or writes of `registers` across this point: it cannot see that WGMMA uses
/// them asynchronously.
template <int kCount>
DSO_DEVICE void keep_in_order(float (&registers)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

/// The same of an operand in registers.
template <int kRows, int kCount>
DSO_DEVICE void keep_in_order(uint32_t (&registers)[kRows][kCount]) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < kCount; ++j) asm volatile("" : "+r"(registers[i][j])::"memory");
    }
}

// Lists of accumulator operands: in the instruction's text and as constraints.
#define DSO_REGS_0_3 "%0, %1, %2, %3"
#define DSO_REGS_0_7 DSO_REGS_0_3 ", %4, %5, %6, %7"
#define DSO_REGS_0_15 DSO_REGS_0_7 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define DSO_REGS_0_31 \
    DSO_REGS_0_15     \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DSO_REGS_0_47 \
    DSO_REGS_0_31     \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define DSO_REGS_0_63 \
    DSO_REGS_0_47     \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DSO_REGS_0_127                                                                                                 \
    DSO_REGS_0_63                                                                                                      \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, " \
    "%107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "     \
    "%125, %126, %127"
#define DSO_ACC_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define DSO_ACC_8(d, i) DSO_ACC_4(d, i), DSO_ACC_4(d, i + 4)
#define DSO_ACC_16(d, i) DSO_ACC_8(d, i), DSO_ACC_8(d, i + 8)
#define DSO_ACC_32(d, i) DSO_ACC_16(d, i), DSO_ACC_16(d, i + 16)

/// `wgmma.mma_async.m64nNk32.f32.e4m3.e4m3`: d = a @ b.T (+ d), both operands K-major in shared memory.
template <int N>
struct WgmmaE4M3;

#define DSO_WGMMA_E4M3(n, registers, desc_a, desc_b, keep, ...)                                              \
    template <>                                                                                              \
    struct WgmmaE4M3<n> {                                                                                    \
        static constexpr int kNumAccumulators = n / 2;                                                       \
        DSO_DEVICE static void mma(float (&d)[kNumAccumulators], uint64_t a, uint64_t b, bool accumulate) {  \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " keep                                            \
                         ", 0;\n"                                                                            \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 {" registers "}, " desc_a \
                         ", " desc_b ", p, 1, 1;\n}\n"                                                       \
                         : __VA_ARGS__                                                                       \
                         : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                               \
        }                                                                                                    \
    };

DSO_WGMMA_E4M3(8, DSO_REGS_0_3, "%4", "%5", "%6", DSO_ACC_4(d, 0))
DSO_WGMMA_E4M3(16, DSO_REGS_0_7, "%8", "%9", "%10", DSO_ACC_8(d, 0))
DSO_WGMMA_E4M3(32, DSO_REGS_0_15, "%16", "%17", "%18", DSO_ACC_16(d, 0))
DSO_WGMMA_E4M3(64, DSO_REGS_0_31, "%32", "%33", "%34", DSO_ACC_32(d, 0))
DSO_WGMMA_E4M3(128, DSO_REGS_0_63, "%64", "%65", "%66", DSO_ACC_32(d, 0), DSO_ACC_32(d, 32))

#undef DSO_WGMMA_E4M3

/// `wgmma.mma_async.m64nNk16.f32` of bf16 or f16: d = a @ b.T (+ d). Operand b is in shared memory, K-major or MN-major
/// ("transposed"); a is K-major there, or in registers: with g = lane / 4 and c = 2 * (lane % 4), a[0] holds elements
/// (g, c) and (g, c + 1) of the warp's 16 rows, a[1] those of row g + 8, and a[2], a[3] those eight columns further on.
/// These are the places that sums have in an accumulator.
template <HalfType type, int N>
struct WgmmaHalf;

#define DSO_WGMMA_HALF(half_type, name, n, registers, r0, r1, r2, r3, r4, r5, ...)                                     \
    template <>                                                                                                        \
    struct WgmmaHalf<HalfType::half_type, n> {                                                                         \
        static constexpr int kNumAccumulators = n / 2;                                                                 \
        DSO_DEVICE static void mma(float (&d)[kNumAccumulators], uint64_t a, uint64_t b, bool accumulate) {            \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " r2                                                        \
                         ", 0;\n"                                                                                      \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" registers "}, " r0       \
                         ", " r1 ", p, 1, 1, 0, 0;\n}\n"                                                               \
                         : __VA_ARGS__                                                                                 \
                         : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                         \
        }                                                                                                              \
        DSO_DEVICE static void mma_transposed(float (&d)[kNumAccumulators], uint64_t a, uint64_t b, bool accumulate) { \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " r2                                                        \
                         ", 0;\n"                                                                                      \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" registers "}, " r0       \
                         ", " r1 ", p, 1, 1, 0, 1;\n}\n"                                                               \
                         : __VA_ARGS__                                                                                 \
                         : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                         \
        }                                                                                                              \
        DSO_DEVICE static void mma_registers(float (&d)[kNumAccumulators], const uint32_t (&a)[4], uint64_t b,         \
                                             bool accumulate) {                                                        \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " r5                                                        \
                         ", 0;\n"                                                                                      \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" registers "}, {" r0      \
                         ", " r1 ", " r2 ", " r3 "}, " r4 ", p, 1, 1, 0;\n}\n"                                         \
                         : __VA_ARGS__                                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));     \
        }                                                                                                              \
        DSO_DEVICE static void mma_registers_transposed(float (&d)[kNumAccumulators], const uint32_t (&a)[4],          \
                                                        uint64_t b, bool accumulate) {                                 \
            asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " r5                                                        \
                         ", 0;\n"                                                                                      \
                         "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" registers "}, {" r0      \
                         ", " r1 ", " r2 ", " r3 "}, " r4 ", p, 1, 1, 1;\n}\n"                                         \
                         : __VA_ARGS__                                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)));     \
        }                                                                                                              \
    };

#define DSO_WGMMA_HALVES(...)                  \
    DSO_WGMMA_HALF(kBF16, "bf16", __VA_ARGS__) \
    DSO_WGMMA_HALF(kF16, "f16", __VA_ARGS__)

DSO_WGMMA_HALVES(8, DSO_REGS_0_3, "%4", "%5", "%6", "%7", "%8", "%9", DSO_ACC_4(d, 0))
DSO_WGMMA_HALVES(16, DSO_REGS_0_7, "%8", "%9", "%10", "%11", "%12", "%13", DSO_ACC_8(d, 0))
DSO_WGMMA_HALVES(32, DSO_REGS_0_15, "%16", "%17", "%18", "%19", "%20", "%21", DSO_ACC_16(d, 0))
DSO_WGMMA_HALVES(64, DSO_REGS_0_31, "%32", "%33", "%34", "%35", "%36", "%37", DSO_ACC_32(d, 0))
DSO_WGMMA_HALVES(128, DSO_REGS_0_63, "%64", "%65", "%66", "%67", "%68", "%69", DSO_ACC_32(d, 0), DSO_ACC_32(d, 32))
DSO_WGMMA_HALVES(256, DSO_REGS_0_127, "%128", "%129", "%130", "%131", "%132", "%133", DSO_ACC_32(d, 0),
                 DSO_ACC_32(d, 32), DSO_ACC_32(d, 64), DSO_ACC_32(d, 96))

#undef DSO_WGMMA_HALVES
#undef DSO_WGMMA_HALF

}  // namespace dso::ptx
