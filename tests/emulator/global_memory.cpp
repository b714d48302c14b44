#include "ptx/global_memory.cuh"

#include "machine.h"

namespace dso::ptx {
namespace {

emulator::WaitList waiting;  // for any release

}  // namespace

// A fiber's writes are seen at once and in their order: what is left to show is that others may run in between.

void wait_for_release(const uint64_t* address, uint64_t value) {
    emulator::maybe_pause();
    while (*address != value) waiting.wait({"a release in global memory"});
}

void store_release(uint64_t* address, uint64_t value) {
    emulator::maybe_pause();
    *address = value;
    waiting.wake();
}

}  // namespace dso::ptx
