// A ring of shared-memory stages between a producer warp and math warpgroups.
#pragma once

#include "ptx/mbarrier.cuh"

namespace dso {

/// Where one side is in the ring: which stage, and the parity of the phase it is in. Both sides begin at (0, 0).
template <int kNumStages>
struct PipelineState {
    uint32_t stage = 0, phase = 0;

    DSO_DEVICE void advance() {
        stage = stage + 1 == kNumStages ? 0 : stage + 1;
        phase ^= stage == 0;
    }
};

/// The ring's barriers; lives in shared memory.
///
///   producer:  acquire -> start copies that complete full[stage]   waits on empty[stage] with parity phase ^ 1
///   consumer:  wait    -> use the stage -> release                 waits on full[stage]  with parity phase
///
/// The first `acquire` of each stage passes at once: parity 1 of a fresh barrier counts as completed.
template <int kNumStages>
struct Pipeline {
    using State = PipelineState<kNumStages>;

    uint64_t full[kNumStages];
    uint64_t empty[kNumStages];

    /// By each lane of one warp; the CTA must synchronise before the first use.
    DSO_DEVICE void init(int lane, uint32_t num_producer_arrivals, uint32_t num_consumer_arrivals) {
        for (int stage = lane; stage < kNumStages; stage += 32) {
            ptx::mbarrier_init(&full[stage], num_producer_arrivals);
            ptx::mbarrier_init(&empty[stage], num_consumer_arrivals);
        }
        ptx::fence_mbarrier_init();
    }

    DSO_DEVICE void acquire(const State& state) { ptx::mbarrier_wait(&empty[state.stage], state.phase ^ 1); }
    DSO_DEVICE void wait(const State& state) { ptx::mbarrier_wait(&full[state.stage], state.phase); }
    DSO_DEVICE void release(const State& state) { ptx::mbarrier_arrive(&empty[state.stage]); }
};

}  // namespace dso
