#include "ptx/sync.cuh"

#include "builtins.h"
#include "machine.h"

namespace emulator {

void change_registers(int num_registers) {
    meet("setmaxnreg");
    Thread& thread = *current;
    Cta& cta = *thread.cta;
    const int more = num_registers - thread.num_registers;
    while (more > cta.spare_registers)
        cta.registers_given_back.wait({"%u more registers", static_cast<uint32_t>(more)});
    cta.spare_registers -= more;
    thread.num_registers = num_registers;
    if (more < 0) cta.registers_given_back.wake();
}

}  // namespace emulator

namespace dso::ptx {

using namespace emulator;

namespace {

/// Returns the phase that this arrival belongs to.
uint32_t arrive(NamedBarrier& barrier, uint32_t id, uint32_t num_threads) {
    if (barrier.arrived == 0) barrier.num_threads = num_threads;
    if (barrier.num_threads != num_threads)
        fail("barrier %u for %u threads, and for %u", id, num_threads, barrier.num_threads);
    const uint32_t phase = barrier.num_phases;
    if (++barrier.arrived == num_threads) {
        barrier.arrived = 0;
        ++barrier.num_phases;
        barrier.waiting.wake();
    }
    return phase;
}

NamedBarrier& named_barrier(uint32_t id, uint32_t num_threads) {
    if (id >= 16 || num_threads == 0 || num_threads % 32 != 0) fail("barrier %u, %u", id, num_threads);
    maybe_pause();
    return current->cta->named_barriers[id];
}

}  // namespace

void named_barrier_arrive(uint32_t id, uint32_t num_threads) {
    arrive(named_barrier(id, num_threads), id, num_threads);
    maybe_pause();  // so that what should have come before it comes late
}

void named_barrier_sync(uint32_t id, uint32_t num_threads) {
    NamedBarrier& barrier = named_barrier(id, num_threads);
    const uint32_t phase = arrive(barrier, id, num_threads);
    while (barrier.num_phases == phase) barrier.waiting.wait({"barrier %u for %u threads", id, num_threads});
}

bool elect_one() { return __ballot_sync(0xFFFFFFFF, true) != 0 && threadIdx.x % 32 == 0; }

}  // namespace dso::ptx

void __syncthreads() { dso::ptx::named_barrier_sync(0, static_cast<uint32_t>(emulator::current->cta->threads.size())); }
