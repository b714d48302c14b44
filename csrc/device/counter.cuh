// Counters that CTAs share, in memory of any content that nobody clears before a launch.
//
// The upper bits say that a number is an open counter. Every CTA opens it before it counts, so that it counts from zero
// whoever comes first; the last to count closes it, so that the next call, too, may find it there.
#pragma once

#include "ptx/types.cuh"

namespace dso {

using Counter = unsigned long long;
inline constexpr int kCountBits = 24;  // how far a counter goes
inline constexpr Counter kOpenCounter = 0x5F'8E3C'21D7ull << kCountBits, kClosedCounter = 0;

DSO_DEVICE void open_counter(Counter* counter) {
    const Counter old = atomicCAS(counter, kClosedCounter, kOpenCounter);
    const bool is_open = old >> kCountBits == kOpenCounter >> kCountBits;
    if (old != kClosedCounter && !is_open) atomicCAS(counter, old, kOpenCounter);
}

/// How many have counted before.
DSO_DEVICE int count(Counter* counter) { return static_cast<int>(atomicAdd(counter, 1ull) - kOpenCounter); }

DSO_DEVICE void close_counter(Counter* counter) { *counter = kClosedCounter; }

}  // namespace dso
