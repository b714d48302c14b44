#pragma once

#include "ptx/types.cuh"

namespace emulator {

/// Of setmaxnreg: by the whole warp. A thread that wants more waits for what others of its CTA give back.
void change_registers(int num_registers);

}  // namespace emulator

namespace dso::ptx {

void named_barrier_sync(uint32_t id, uint32_t num_threads);
void named_barrier_arrive(uint32_t id, uint32_t num_threads);

template <int kRegisters>
void setmaxnreg_inc() {
    emulator::change_registers(kRegisters);
}
template <int kRegisters>
void setmaxnreg_dec() {
    emulator::change_registers(kRegisters);
}

inline int compute_here(int x) { return x; }

/// By the whole warp.
bool elect_one();

// A launch ends before the next begins.
inline void grid_launch_dependents() {}
inline void grid_dependency_wait() {}

}  // namespace dso::ptx
