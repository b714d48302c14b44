#pragma once

#include "ptx/types.cuh"

namespace emulator {

/// Of setmaxnreg, which changes nothing here but wants the whole warp.
void change_registers();

}  // namespace emulator

namespace dso::ptx {

void named_barrier_sync(uint32_t id, uint32_t num_threads);
void named_barrier_arrive(uint32_t id, uint32_t num_threads);

template <int kRegisters>
void setmaxnreg_inc() {
    emulator::change_registers();
}
template <int kRegisters>
void setmaxnreg_dec() {
    emulator::change_registers();
}

inline int compute_here(int x) { return x; }

// A launch ends before the next begins.
inline void grid_launch_dependents() {}
inline void grid_dependency_wait() {}

}  // namespace dso::ptx
