#include "ptx/wgmma.cuh"

#include <cuda_fp8.h>

#include <array>

#include "machine.h"

namespace emulator {
namespace {

constexpr int kStepBytes = 32;  // of K in one instruction: 32 elements of e4m3
constexpr int kAtomRowBytes = 128;

/// A matrix descriptor: an operand in shared memory under the 128-byte swizzle, its rows along K.
class Operand {
  public:
    Operand(const Cta& cta, uint64_t descriptor)
        : cta_(&cta), start_((descriptor & 0x3FFF) << 4), atom_stride_((descriptor >> 32 & 0x3FFF) << 4) {
        if (descriptor >> 62 != 1) fail("wgmma: the emulator knows the 128-byte swizzle only");
        if ((descriptor >> 49 & 7) != 0) fail("wgmma: the emulator knows no base offset");
    }

    /// 16 bytes of a row. As in hardware, the swizzle goes by the address: bits 4 to 6 are combined with bits 7 to 9.
    const uint8_t* chunk(int row, int chunk) const {
        const uint32_t linear = start_ + row / 8 * atom_stride_ + row % 8 * kAtomRowBytes + chunk * 16;
        const uint32_t offset = linear ^ (linear >> 7 & 7) << 4;
        if (offset < kSharedBase || offset + 16 > kSharedBase + kStaticBytes + cta_->dynamic_bytes)
            fail("wgmma: row %d of an operand is at 0x%x, outside shared memory", row, offset);
        return cta_->shared + (offset - kSharedBase);
    }

  private:
    const Cta* cta_;
    uint32_t start_, atom_stride_;
};

std::array<float, 256> make_e4m3_values() {
    std::array<float, 256> values;
    for (int i = 0; i < 256; ++i) {
        __nv_fp8_e4m3 x;
        x.__x = static_cast<__nv_fp8_storage_t>(i);
        values[i] = static_cast<float>(x);
    }
    return values;
}

struct E4M3Row {
    float x[kStepBytes];

    E4M3Row(const Operand& operand, int row) {
        static const std::array<float, 256> values = make_e4m3_values();
        for (int i = 0; i < kStepBytes; ++i) x[i] = values[operand.chunk(row, i / 16)[i % 16]];
    }

    float dot(const E4M3Row& other) const {
        float sum = 0;
        for (int i = 0; i < kStepBytes; ++i) sum += x[i] * other.x[i];
        return sum;
    }
};

/// d += a @ b.T, for one thread's part of d.
void add_product(std::vector<float>& d, int num_columns, const Operand& a, const Operand& b, uint32_t thread) {
    const int row = thread % 128 / 32 * 16 + thread % 32 / 4;
    const E4M3Row upper(a, row), lower(a, row + 8);
    for (int j = 0; j < num_columns / 8; ++j) {
        for (int i = 0; i < 2; ++i) {
            const E4M3Row column(b, 8 * j + 2 * (thread % 4) + i);
            d[4 * j + i] += upper.dot(column);
            d[4 * j + 2 + i] += lower.dot(column);
        }
    }
}

/// From now on the thread must not look at d: it finds poison there.
void give_away(Thread& thread, float* d, int num_accumulators) {
    const auto [entry, is_new] = thread.accumulators.try_emplace(d);
    ++entry->second.num_in_flight;
    if (!is_new) return;
    if (!thread.has_wgmma_fence) fail("wgmma.mma_async: its accumulators were touched, and no wgmma.fence came after");
    entry->second.values.assign(d, d + num_accumulators);
    memset(d, kPoison, num_accumulators * sizeof(float));
}

void give_back(Thread& thread, float* d) {
    const auto entry = thread.accumulators.find(d);
    if (--entry->second.num_in_flight != 0) return;
    std::copy(entry->second.values.begin(), entry->second.values.end(), d);
    thread.accumulators.erase(entry);
}

}  // namespace

void multiply_e4m3(float* d, int num_columns, uint64_t a, uint64_t b, bool accumulate) {
    const char* const name = "wgmma.mma_async";
    meet(name);
    Thread& thread = *current;
    give_away(thread, d, num_columns / 2);
    const Operand operand_a(*thread.cta, a), operand_b(*thread.cta, b);
    const OperationPtr operation = start(name, thread.cta, [=, &thread, previous = thread.last_wgmma] {
        if (previous) complete(previous);
        std::vector<float>& values = thread.accumulators.at(d).values;
        if (!accumulate) std::fill(values.begin(), values.end(), 0.f);
        add_product(values, num_columns, operand_a, operand_b, thread.number);
        give_back(thread, d);
    });
    thread.last_wgmma = operation;
    thread.wgmmas.add(operation);
}

void wait_for_wgmma(size_t num_pending) {
    meet("wgmma.wait_group");
    current->wgmmas.wait_for_all_but(num_pending);
    current->has_wgmma_fence = false;
}

}  // namespace emulator

namespace dso::ptx {

using namespace emulator;

void wgmma_fence() {
    meet("wgmma.fence");
    current->has_wgmma_fence = true;
}

void wgmma_commit() {
    meet("wgmma.commit_group");
    current->wgmmas.commit();
}

}  // namespace dso::ptx
