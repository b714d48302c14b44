// Where the segments begin and end that offsets cut rows into: the sequences of a batch.
//
// Offsets are not trusted: they are clamped to the rows there are, and each counts as the largest so far.
#pragma once

#include "device/math.cuh"

namespace dso {

/// Inclusive scan over the lanes of a warp.
template <typename Combine>
DSO_DEVICE int scan_lanes(int x, const Combine& combine) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int before = __shfl_up_sync(0xFFFFFFFF, x, distance);
        if (lane >= distance) x = combine(before, x);
    }
    return x;
}

/// The segments that 32 lanes stand for, of b + 2: 1 to b are those of the `offsets` [b + 1], and before and after them
/// are the rows of none.
class Segments {
  public:
    DSO_DEVICE Segments(const int32_t* offsets, int b, int num_rows) : offsets_(offsets), b_(b), num_rows_(num_rows) {}

    /// By all lanes, for their segments in ascending order.
    DSO_DEVICE void load(int segment) {
        const int offset = segment <= b_ ? max(0, min(offsets_[segment], num_rows_)) : num_rows_;
        end = scan_lanes(max(offset, last_), [](int x, int y) { return max(x, y); });
        const int before = __shfl_up_sync(0xFFFFFFFF, end, 1);
        start = threadIdx.x % 32 == 0 ? last_ : before;
        last_ = __shfl_sync(0xFFFFFFFF, end, 31);
    }

    int start = 0, end = 0;

  private:
    const int32_t* offsets_;
    int b_, num_rows_, last_ = 0;
};

}  // namespace dso
