#include "ptx/cp_async.cuh"

#include <cstring>

#include "mbarrier.h"

namespace emulator {
namespace {

void copy(void* destination, const void* source, uint32_t num_bytes, bool valid) {
    maybe_pause();
    const char* const name = "cp.async";
    const uint32_t address = address_of(destination);
    if (address % num_bytes != 0 || (valid && reinterpret_cast<uintptr_t>(source) % num_bytes != 0))
        fail("%s: not aligned to %u bytes", name, num_bytes);
    const Place place = place_of(address, num_bytes, name);
    memset(place.bytes, kPoison, num_bytes);
    current->copies.push_back(start(name, place.cta, [=] {
        if (valid) {
            memcpy(place.bytes, source, num_bytes);
        } else {
            memset(place.bytes, 0, num_bytes);
        }
    }));
}

}  // namespace
}  // namespace emulator

namespace dso::ptx {

using namespace emulator;

void cp_async_4(void* destination, const void* source, bool valid) { copy(destination, source, 4, valid); }
void cp_async_16(void* destination, const void* source, bool valid) { copy(destination, source, 16, valid); }

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

void cp_async_commit() {
    maybe_pause();
    for (OperationPtr& copy : current->copies) current->copy_groups.add(std::move(copy));
    current->copies.clear();
    current->copy_groups.commit();
}

void cp_async_wait_for_all_but(size_t num_pending) {
    maybe_pause();
    current->copy_groups.wait_for_all_but(num_pending);
}

}  // namespace dso::ptx
