#include "ptx/sync.cuh"

#include "machine.h"

namespace emulator {

void change_registers() { meet("setmaxnreg"); }

}  // namespace emulator

namespace dso::ptx {

using namespace emulator;

void named_barrier_sync(uint32_t id, uint32_t num_threads) {
    if (id >= 16 || num_threads == 0 || num_threads % 32 != 0) fail("barrier.sync %u, %u", id, num_threads);
    maybe_pause();
    NamedBarrier& barrier = current->cta->named_barriers[id];
    if (barrier.arrived == 0) barrier.num_threads = num_threads;
    if (barrier.num_threads != num_threads)
        fail("barrier.sync %u for %u threads, and for %u", id, num_threads, barrier.num_threads);
    const uint32_t phase = barrier.num_phases;
    if (++barrier.arrived == num_threads) {
        barrier.arrived = 0;
        ++barrier.num_phases;
        barrier.waiting.wake();
    }
    while (barrier.num_phases == phase) barrier.waiting.wait({"barrier %u for %u threads", id, num_threads});
}

}  // namespace dso::ptx

void __syncthreads() { dso::ptx::named_barrier_sync(0, static_cast<uint32_t>(emulator::current->cta->threads.size())); }
