// Division by a number that is known before the launch: a multiplication and a shift. The machine has no instruction
// for it and would take some two hundred clocks, at the start of a kernel for each that depends on the one before.
//
// Source: Granlund and Montgomery, "Division by Invariant Integers using Multiplication", PLDI 1994, theorem 4.2.
#pragma once

#include "ptx/types.cuh"

namespace dso {

/// A number of at least 1, or anything that is not divided by. `x / divisor` and `x % divisor` are right for x >= 0.
class Divisor {
  public:
    Divisor() = default;
    Divisor(int value) : value_(value) {  // NOLINT: it is that number
        if (value < 2) return;
        int bits = 1;
        while (int64_t{1} << bits < value) ++bits;
        multiplier_ = static_cast<uint32_t>((uint64_t{1} << (31 + bits)) / static_cast<uint32_t>(value) + 1);
        shift_ = bits - 1;
    }

    DSO_HOST_DEVICE operator int() const { return value_; }  // NOLINT

    friend DSO_HOST_DEVICE int operator/(int x, const Divisor& divisor) {
        const uint64_t product = uint64_t{static_cast<uint32_t>(x)} * divisor.multiplier_;
        return divisor.value_ == 1 ? x : static_cast<int>(static_cast<uint32_t>(product >> 32) >> divisor.shift_);
    }
    friend DSO_HOST_DEVICE int operator%(int x, const Divisor& divisor) { return x - x / divisor * divisor.value_; }

  private:
    int value_ = 0;
    uint32_t multiplier_ = 0;
    int shift_ = 0;
};

}  // namespace dso
