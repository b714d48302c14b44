#include "ptx/cp_async.cuh"

#include <cstring>

#include "mbarrier.h"

namespace dso::ptx {

using namespace emulator;

void cp_async_4(void* destination, const void* source, bool valid) {
    maybe_pause();
    const char* const name = "cp.async";
    const uint32_t address = address_of(destination);
    if (address % 4 != 0 || reinterpret_cast<uintptr_t>(source) % 4 != 0) fail("%s: not aligned to 4 bytes", name);
    const Place place = place_of(address, 4, name);
    memset(place.bytes, kPoison, 4);
    current->copies.push_back(start(name, place.cta, [=] {
        const uint32_t zero = 0;
        memcpy(place.bytes, valid ? source : &zero, 4);
    }));
}

void cp_async_mbarrier_arrive(uint64_t* barrier) {
    maybe_pause();
    const char* const name = "cp.async.mbarrier.arrive";
    const Place place = asynchronous_mbarrier(address_of(barrier), name);
    start(name, place.cta, [=, copies = std::move(current->copies)] {
        for (const OperationPtr& copy : copies) complete(copy);
        arrive(place, name);
    });
    current->copies.clear();
}

}  // namespace dso::ptx
