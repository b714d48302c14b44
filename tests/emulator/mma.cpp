#include "ptx/mma.cuh"

#include <cuda_fp16.h>

#include "machine.h"

namespace emulator {
namespace {

/// Elements 0 to 15 along K of a row of a, or of a column of b: of the four lanes that have it, registers `low` and
/// `high` hold two of the first and of the second eight.
struct AlongK {
    float x[16];

    AlongK(const Registers* quad, int low, int high, bool is_bf16) {
        for (int k = 0; k < 16; ++k) {
            const uint32_t pair = quad[k % 8 / 2].x[k < 8 ? low : high];
            const auto half = static_cast<uint16_t>(k % 2 ? pair >> 16 : pair);
            x[k] = is_bf16 ? bits_as<float>(uint32_t{half} << 16) : __half2float(__ushort_as_half(half));
        }
    }

    float dot(const AlongK& other) const {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += x[k] * other.x[k];
        return sum;
    }
};

}  // namespace
}  // namespace emulator

namespace dso::ptx {

using namespace emulator;

void mma_16x8x16(bool is_bf16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const Registers* lanes = meet_with_registers("mma.sync", {a[0], a[1], a[2], a[3], b0, b1});
    const uint32_t lane = current->lane();
    const Registers* rows = lanes + lane / 4 * 4;
    const AlongK upper(rows, 0, 2, is_bf16), lower(rows, 1, 3, is_bf16);
    for (int i = 0; i < 2; ++i) {
        const AlongK column(lanes + 4 * (2 * (lane % 4) + i), 4, 5, is_bf16);
        d[i] += upper.dot(column);
        d[2 + i] += lower.dot(column);
    }
}

}  // namespace dso::ptx
