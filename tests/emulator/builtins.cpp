#include "machine.h"

namespace emulator {

uint32_t lane_index() { return current->lane(); }

const uint32_t* meet_in_full(const char* instruction, uint32_t mask, uint32_t value) {
    if (mask != 0xFFFFFFFF) fail("%s of the lanes 0x%08x: the emulator knows whole warps only", instruction, mask);
    return meet(instruction, value);
}

}  // namespace emulator

// Those of the thread that runs.
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

uint32_t __ballot_sync(uint32_t mask, bool vote) {
    const uint32_t* votes = emulator::meet_in_full("a vote", mask, vote);
    uint32_t ballot = 0;
    for (int lane = 0; lane < 32; ++lane) ballot |= votes[lane] << lane;
    return ballot;
}
