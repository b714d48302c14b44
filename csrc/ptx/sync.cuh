// Named barriers, register reallocation, and the order of a grid after the one before it.
#pragma once

#include "ptx/types.cuh"

namespace dso::ptx {

/// `barrier.sync`: waits for `num_threads` threads at barrier `id` (0 is __syncthreads).
DSO_DEVICE void named_barrier_sync(uint32_t id, uint32_t num_threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

/// `barrier.arrive`: counts as one of the `num_threads` threads at barrier `id`, and goes on.
DSO_DEVICE void named_barrier_arrive(uint32_t id, uint32_t num_threads) {
    asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(num_threads) : "memory");
}

/// `setmaxnreg.inc`: this warpgroup takes `kRegisters` registers a thread, waiting until they are free.
template <int kRegisters>
DSO_DEVICE void setmaxnreg_inc() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// `setmaxnreg.dec`: this warpgroup keeps `kRegisters` registers a thread.
template <int kRegisters>
DSO_DEVICE void setmaxnreg_dec() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// `x`, of which the compiler knows nothing before this point: what depends on it is not computed ahead of a loop,
/// where it would only take up registers.
DSO_DEVICE int compute_here(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

/// `griddepcontrol.launch_dependents`: the next grid of the stream may start, if it was launched as a programmatic
/// dependent, once every CTA of this one has said so.
DSO_DEVICE void grid_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

/// `griddepcontrol.wait`: until the grids that this one depends on have ended and their writes can be seen.
DSO_DEVICE void grid_dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

/// `elect.sync`: true in one lane of the warp, the same one every time. The compiler then knows that what follows runs
/// once: instructions that take their operands from the uniform datapath need no loop over lanes.
DSO_DEVICE bool elect_one() {
    uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred elected;\n"
        "elect.sync _|elected, 0xFFFFFFFF;\n"
        "selp.b32 %0, 1, 0, elected;\n"
        "}\n"
        : "=r"(elected));
    return elected != 0;
}

}  // namespace dso::ptx
