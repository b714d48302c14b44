// Sums that a CTA leaves in global memory for another one, which has the last steps of the same tile (stream_k.cuh).
#pragma once

#include "ptx/global_memory.cuh"

namespace dso {

/// What says that a warp's sums are there: whoever takes them clears it, and memory that nobody has cleared does not
/// hold it.
inline constexpr uint64_t kSumsAreLeft = 0x6C1D'93B2'E57A'408Full;

/// The sums of a warp, as its lanes have them, so that both sides read and write whole lines. One by one: where several
/// go into one instruction they need neighbouring registers, and promotion wants them elsewhere (promote.cuh).
template <int kNumSums>
class LeftSums {
  public:
    /// `place` numbers the warps of all CTAs.
    DSO_DEVICE LeftSums(float* sums, uint64_t* left, int place)
        : sums_(sums + int64_t{place} * kNumSums * 32 + threadIdx.x % 32), left_(left + place) {}

    DSO_DEVICE void leave(const float (&sum)[kNumSums]) const {
#pragma unroll
        for (int i = 0; i < kNumSums; ++i) sums_[i * 32] = sum[i];
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::store_release(left_, kSumsAreLeft);
    }

    /// Waits until they are left, and adds them.
    DSO_DEVICE void take(float (&sum)[kNumSums]) const {
        ptx::wait_for_release(left_, kSumsAreLeft);
        float theirs[kNumSums];  // all of them asked for before the first is waited for
#pragma unroll
        for (int i = 0; i < kNumSums; ++i) theirs[i] = __ldcg(sums_ + i * 32);
#pragma unroll
        for (int i = 0; i < kNumSums; ++i) sum[i] += theirs[i];
        __syncwarp();  // every lane has seen it
        if (threadIdx.x % 32 == 0) *left_ = 0;
    }

  private:
    float* sums_;
    uint64_t* left_;
};

}  // namespace dso
