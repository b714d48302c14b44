// Which tile of a GEMM whose groups share out K a CTA computes next, from offsets that lie on the device.
#pragma once

#include "device/k_group_schedule.h"
#include "device/math.cuh"
#include "device/scheduler.cuh"

namespace dso {

struct KGroupTile {
    int group, m_block, n_block;
    int first_k_block, last_k_block;
};

/// The tiles of this CTA, in order, group by group. Each warp has a scheduler of its own, which all its lanes ask
/// together.
template <int BLOCK_M, int BLOCK_N, int BLOCK_K>
class KGroupScheduler {
  public:
    DSO_DEVICE KGroupScheduler(const KGroupSchedule& schedule, int cta, int num_ctas)
        : schedule_(schedule),
          num_m_blocks_(ceil_div(schedule.m, BLOCK_M)),
          num_n_blocks_(ceil_div(schedule.n, BLOCK_N)),
          next_(cta),
          step_(num_ctas) {}

    DSO_DEVICE bool next(KGroupTile& tile) {
        const int tiles_per_group = num_m_blocks_ * num_n_blocks_, group = next_ / tiles_per_group;
        if (group >= schedule_.num_groups) return false;
        if (group != group_) {
            group_ = group;
            const int begin = largest_offset(group + 1);
            first_k_block_ = begin / BLOCK_K;
            last_k_block_ = max(begin, clamp(schedule_.k_offsets[group + 1])) / BLOCK_K;
        }
        const Tile at = rasterize(next_ - group * tiles_per_group, num_m_blocks_, num_n_blocks_);
        tile = {group, at.m_block, at.n_block, first_k_block_, last_k_block_};
        next_ += step_;
        return true;
    }

  private:
    /// Offsets are not trusted: each is clamped to the columns there are, and counts as the largest so far.
    DSO_DEVICE int largest_offset(int count) const {
        int largest = 0;
        for (int i = threadIdx.x % 32; i < count; i += 32) largest = max(largest, clamp(schedule_.k_offsets[i]));
        return __reduce_max_sync(0xFFFFFFFF, largest);
    }

    DSO_DEVICE int clamp(int offset) const { return min(max(offset, 0), schedule_.k); }

    const KGroupSchedule& schedule_;
    const int num_m_blocks_, num_n_blocks_;
    int next_, step_;
    int group_ = -1, first_k_block_ = 0, last_k_block_ = 0;
};

}  // namespace dso
