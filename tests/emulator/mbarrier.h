// What the other instructions do to mbarriers.
#pragma once

#include "machine.h"

namespace emulator {

/// The barrier at `address`; fails where none was initialised, or something has written over it.
Mbarrier& mbarrier_at(const Place& place, const char* instruction);

/// One that an asynchronous instruction may use.
Place asynchronous_mbarrier(uint32_t address, const char* instruction);

void arrive(const Place& place, const char* instruction);
void complete_bytes(const Place& place, uint32_t num_bytes, const char* instruction);

}  // namespace emulator
