#include "ptx/wgmma.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <array>
#include <cstring>

#include "machine.h"

namespace emulator {
namespace {

constexpr const char* kName = "wgmma.mma_async";
constexpr int kStepBytes = 32;   // of K in one instruction
constexpr int kAtomBytes = 128;  // of a row under the swizzle; an atom has eight of them

int bytes_of(Element element) { return element == Element::kE4M3 ? 1 : 2; }
int step_of(Element element) { return kStepBytes / bytes_of(element); }

std::array<float, 256> make_e4m3_values() {
    std::array<float, 256> values;
    for (int i = 0; i < 256; ++i) {
        __nv_fp8_e4m3 x;
        x.__x = static_cast<__nv_fp8_storage_t>(i);
        values[i] = static_cast<float>(x);
    }
    return values;
}

float value_of(Element element, const uint8_t* at) {
    static const std::array<float, 256> e4m3_values = make_e4m3_values();
    if (element == Element::kE4M3) return e4m3_values[*at];
    uint16_t half;
    memcpy(&half, at, sizeof(half));
    return element == Element::kF16 ? __half2float(__ushort_as_half(half)) : bits_as<float>(uint32_t{half} << 16);
}

/// The elements of a row along the K of one instruction.
struct Row {
    float x[kStepBytes] = {};

    float dot(const Row& other) const {
        float sum = 0;
        for (int i = 0; i < kStepBytes; ++i) sum += x[i] * other.x[i];
        return sum;
    }
};

/// Reads an operand as its matrix descriptor says, under the 128-byte swizzle.
class Matrix {
  public:
    Matrix(const Cta& cta, SharedOperand operand, Element element)
        : cta_(&cta),
          element_(element),
          is_mn_major_(operand.is_mn_major),
          start_((operand.descriptor & 0x3FFF) << 4),
          leading_((operand.descriptor >> 16 & 0x3FFF) << 4),
          stride_((operand.descriptor >> 32 & 0x3FFF) << 4) {
        if (operand.descriptor >> 62 != 1) fail("%s: the emulator knows the 128-byte swizzle only", kName);
        if ((operand.descriptor >> 49 & 7) != 0) fail("%s: the emulator knows no base offset", kName);
        if (is_mn_major_ && element == Element::kE4M3) fail("%s: e4m3 must be K-major", kName);
    }

    Row row(int row) const {
        Row values;
        const int size = bytes_of(element_);
        for (int k = 0; k < step_of(element_); ++k)
            values.x[k] =
                value_of(element_, at(is_mn_major_ ? mn_major_offset(row, k) : k_major_offset(row, k * size)));
        return values;
    }

  private:
    /// Atoms of eight rows follow one another at `stride`.
    uint32_t k_major_offset(int row, int byte) const { return row / 8 * stride_ + row % 8 * kAtomBytes + byte; }

    /// An atom has eight k of 64 rows each. The next k are at `stride`, the next rows at `leading`.
    uint32_t mn_major_offset(int row, int k) const {
        return row / 64 * leading_ + row % 64 * 2 + k / 8 * stride_ + k % 8 * kAtomBytes;
    }

    /// As in hardware, the swizzle goes by the address: bits 4 to 6 are combined with bits 7 to 9.
    const uint8_t* at(uint32_t offset) const {
        const uint32_t linear = start_ + offset, address = linear ^ (linear >> 7 & 7) << 4;
        if (address < kSharedBase || address >= kSharedBase + kStaticBytes + cta_->dynamic_bytes)
            fail("%s: an operand is at 0x%x, outside shared memory", kName, address);
        return cta_->shared + (address - kSharedBase);
    }

    const Cta* cta_;
    Element element_;
    bool is_mn_major_;
    uint32_t start_, leading_, stride_;
};

/// The two rows of `a` that the thread multiplies, each with all columns of its part of d.
struct RowPair {
    Row upper, lower;
};

RowPair rows_of_thread(const Matrix& a, uint32_t thread) {
    const int row = thread % 128 / 32 * 16 + thread % 32 / 4;
    return {a.row(row), a.row(row + 8)};
}

/// The four lanes that share these rows hold two neighbours of eight each; lower rows are in the odd registers.
using Quad = std::array<const uint32_t*, 4>;

RowPair rows_of_quad(const Quad& quad, Element element) {
    RowPair rows;
    for (int k = 0; k < step_of(element); ++k) {
        const uint32_t* registers = quad[k % 8 / 2] + k / 8 * 2;
        rows.upper.x[k] = value_of(element, reinterpret_cast<const uint8_t*>(&registers[0]) + k % 2 * 2);
        rows.lower.x[k] = value_of(element, reinterpret_cast<const uint8_t*>(&registers[1]) + k % 2 * 2);
    }
    return rows;
}

void add_product(std::vector<float>& d, const RowPair& a, const Matrix& b, uint32_t thread) {
    for (size_t j = 0; j < d.size() / 4; ++j) {
        for (int i = 0; i < 2; ++i) {
            const Row column = b.row(static_cast<int>(8 * j + 2 * (thread % 4) + i));
            d[4 * j + i] += a.upper.dot(column);
            d[4 * j + 2 + i] += a.lower.dot(column);
        }
    }
}

/// From now on the thread must not look at d: it finds poison there.
void give_away(Thread& thread, float* d, int num_accumulators) {
    const auto [entry, is_new] = thread.accumulators.try_emplace(d);
    ++entry->second.num_in_flight;
    if (!is_new) return;
    if (!thread.has_wgmma_fence) fail("%s: its registers were touched, and no wgmma.fence came after", kName);
    entry->second.values.assign(d, d + num_accumulators);
    memset(d, kPoison, num_accumulators * sizeof(float));
}

void give_back(Thread& thread, float* d) {
    const auto entry = thread.accumulators.find(d);
    if (--entry->second.num_in_flight != 0) return;
    std::copy(entry->second.values.begin(), entry->second.values.end(), d);
    thread.accumulators.erase(entry);
}

/// `read_a()` gives the rows of a, at the time when they are multiplied.
template <typename ReadA>
void start_multiply(float* d, int num_columns, const Matrix& b, bool accumulate, const ReadA& read_a) {
    Thread& thread = *current;
    if (num_columns % 8 != 0 || num_columns > 256) fail("%s: there is none of %d columns", kName, num_columns);
    give_away(thread, d, num_columns / 2);
    thread.last_wgmma = start(kName, thread.cta, [=, &thread, previous = thread.last_wgmma] {
        if (previous) complete(previous);
        std::vector<float>& values = thread.accumulators.at(d).values;
        if (!accumulate) std::fill(values.begin(), values.end(), 0.f);
        add_product(values, read_a(), b, thread.number);
        give_back(thread, d);
    });
    thread.wgmmas.add(thread.last_wgmma);
}

}  // namespace

void multiply(float* d, int num_columns, Element element, SharedOperand a, SharedOperand b, bool accumulate) {
    meet(kName);
    const Cta& cta = *current->cta;
    start_multiply(d, num_columns, Matrix(cta, b, element), accumulate,
                   [rows = Matrix(cta, a, element), thread = current->number] { return rows_of_thread(rows, thread); });
}

void multiply_registers(float* d, int num_columns, Element element, const uint32_t (&a)[4], SharedOperand b,
                        bool accumulate) {
    if (element == Element::kE4M3) fail("%s: the emulator knows e4m3 in shared memory only", kName);
    const auto pointer = reinterpret_cast<uintptr_t>(&a);
    const uint32_t first = current->lane() / 4 * 4;
    std::array<uintptr_t, 4> pointers;
    const uint32_t* halves = meet(kName, static_cast<uint32_t>(pointer));
    for (uint32_t i = 0; i < 4; ++i) pointers[i] = halves[first + i];
    halves = meet(kName, static_cast<uint32_t>(pointer >> 32));
    Quad quad;
    for (uint32_t i = 0; i < 4; ++i)
        quad[i] = reinterpret_cast<const uint32_t*>(pointers[i] | uintptr_t{halves[first + i]} << 32);
    current->lends_registers_to_wgmma = true;
    start_multiply(d, num_columns, Matrix(*current->cta, b, element), accumulate,
                   [quad, element] { return rows_of_quad(quad, element); });
}

void wait_for_wgmma(size_t num_pending) {
    const char* const name = "wgmma.wait_group";
    meet(name);
    current->wgmmas.wait_for_all_but(num_pending);
    current->has_wgmma_fence = false;
    // A lane's registers are read by its neighbours' WGMMAs, too.
    if (current->lends_registers_to_wgmma) meet(name);
    if (num_pending == 0) current->lends_registers_to_wgmma = false;
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
