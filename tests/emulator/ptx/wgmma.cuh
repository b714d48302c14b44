#pragma once

#include "ptx/types.cuh"

namespace emulator {

enum class Element { kE4M3, kF16, kBF16 };

/// An operand in shared memory: its rows along K, or (of 16-bit elements) its columns, "transposed".
struct SharedOperand {
    uint64_t descriptor;
    bool is_mn_major = false;
};

/// The calling thread's part of wgmma.mma_async.m64n`num_columns`, float32 sums of products of `element`, K being 32
/// bytes of them: d = a @ b.T (+ d). Of 16-bit elements `a` may also lie in registers.
void multiply(float* d, int num_columns, Element element, SharedOperand a, SharedOperand b, bool accumulate);
void multiply_registers(float* d, int num_columns, Element element, const uint32_t (&a)[4], SharedOperand b,
                        bool accumulate);

void wait_for_wgmma(size_t num_pending);

}  // namespace emulator

namespace dso::ptx {

void wgmma_fence();
void wgmma_commit();

template <int kPending>
void wgmma_wait() {
    emulator::wait_for_wgmma(kPending);
}

template <int kCount>
void keep_in_order(float (&)[kCount]) {}
template <int kRows, int kCount>
void keep_in_order(uint32_t (&)[kRows][kCount]) {}

template <int N>
struct WgmmaE4M3 {
    static constexpr int kNumAccumulators = N / 2;
    static void mma(float (&d)[kNumAccumulators], uint64_t a, uint64_t b, bool accumulate) {
        emulator::multiply(d, N, emulator::Element::kE4M3, {a}, {b}, accumulate);
    }
};

template <HalfType type, int N>
struct WgmmaHalf {
    static constexpr int kNumAccumulators = N / 2;
    static constexpr auto kElement = type == HalfType::kBF16 ? emulator::Element::kBF16 : emulator::Element::kF16;

    static void mma(float (&d)[kNumAccumulators], uint64_t a, uint64_t b, bool accumulate) {
        emulator::multiply(d, N, kElement, {a}, {b}, accumulate);
    }
    static void mma_transposed(float (&d)[kNumAccumulators], uint64_t a, uint64_t b, bool accumulate) {
        emulator::multiply(d, N, kElement, {a}, {b, true}, accumulate);
    }
    static void mma_registers(float (&d)[kNumAccumulators], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
        emulator::multiply_registers(d, N, kElement, a, {b}, accumulate);
    }
    static void mma_registers_transposed(float (&d)[kNumAccumulators], const uint32_t (&a)[4], uint64_t b,
                                         bool accumulate) {
        emulator::multiply_registers(d, N, kElement, a, {b, true}, accumulate);
    }
};

}  // namespace dso::ptx
