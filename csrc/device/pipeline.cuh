// A ring of shared-memory stages between a producer warp and math warpgroups.
#pragma once

#include "ptx/mbarrier.cuh"

namespace dso {

/// Where one side is in the ring: which stage, and the parity of the phase it is in. Both sides begin at (0, 0), unless
/// groups of warps take the stages in turn: then each has every kStride-th, from that of its own number on.
template <int kNumStages, int kStride = 1>
struct PipelineState {
    static_assert(kNumStages % kStride == 0, "a stage must always be the same group's");
    uint32_t stage = 0, phase = 0;

    DSO_DEVICE void advance() {
        const uint32_t next = stage + kStride;
        if constexpr (kStride == 1) {
            stage = next == kNumStages ? 0 : next;
        } else {
            stage = next >= kNumStages ? next - kNumStages : next;
        }
        phase ^= stage < kStride;
    }
};

/// How many of each tile's steps are a group's, where kNumGroups groups take all steps in turn, across tiles.
template <int kNumGroups>
class StepsInTurn {
  public:
    DSO_DEVICE explicit StepsInTurn(int group) : distance_(group) {}

    DSO_DEVICE int of_tile(int num_steps) {
        const int own = (num_steps - distance_ + kNumGroups - 1) / kNumGroups;
        distance_ += own * kNumGroups - num_steps;
        return own;
    }

  private:
    int distance_;  // from the next tile's first step to this group's next; less than kNumGroups
};

/// The ring's barriers; lives in shared memory.
///
///   producer:  acquire -> start copies that complete full[stage]   waits on empty[stage] with parity phase ^ 1
///   consumer:  wait    -> use the stage -> release                 waits on full[stage]  with parity phase
///
/// What WGMMA reads has been read when its wait is over. An ordinary load may still be under way when a later `release`
/// of the same warp has arrived, and then deliver what TMA has written since. So each lane that read a stage by loads
/// has used what they brought before the release, or executes `fence_proxy_async_shared` between. (A test of the
/// machine code holds all kernels to that.)
///
/// The first `acquire` of each stage passes at once: parity 1 of a fresh barrier counts as completed.
template <int kNumStages>
struct Pipeline {
    using State = PipelineState<kNumStages>;
    template <int kStride>
    using StateOfGroup = PipelineState<kNumStages, kStride>;

    uint64_t full[kNumStages];
    uint64_t empty[kNumStages];

    /// By one thread; the CTA must synchronise before the first use. (A lane for each stage would take longer: the
    /// instruction wants an address that is the same for all, and they would take turns.)
    DSO_DEVICE void init(uint32_t num_producer_arrivals, uint32_t num_consumer_arrivals) {
        for (int stage = 0; stage < kNumStages; ++stage) {
            ptx::mbarrier_init(&full[stage], num_producer_arrivals);
            ptx::mbarrier_init(&empty[stage], num_consumer_arrivals);
        }
        ptx::fence_mbarrier_init();
    }

    DSO_DEVICE void acquire(const State& state) { ptx::mbarrier_wait(&empty[state.stage], state.phase ^ 1); }

    template <int kStride>
    DSO_DEVICE void wait(const StateOfGroup<kStride>& state) {
        ptx::mbarrier_wait(&full[state.stage], state.phase);
    }

    template <int kStride>
    DSO_DEVICE void release(const StateOfGroup<kStride>& state) {
        ptx::mbarrier_arrive(&empty[state.stage]);
    }
};

}  // namespace dso
