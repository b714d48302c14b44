#include "ptx/mbarrier.cuh"

#include "mbarrier.h"

namespace emulator {
namespace {

constexpr uint64_t kMark = 0x6d62617272696572;
constexpr uint32_t kMaxCount = (1u << 20) - 1;  // of arrivals, and of bytes

Place place_of_barrier(uint32_t address, const char* instruction) {
    if (address % 8 != 0) fail("%s: 0x%x is not aligned to 8 bytes", instruction, address);
    return place_of(address, 8, instruction);
}

void complete_phase_if_due(Mbarrier& barrier, const Place& place) {
    if (barrier.pending != 0 || barrier.pending_bytes > 0) return;
    if (barrier.pending_bytes < 0)
        fail("the mbarrier at 0x%x got %lld bytes more than it was told to expect", place.offset,
             static_cast<long long>(-barrier.pending_bytes));
    barrier.pending = barrier.num_arrivals;
    ++barrier.num_phases;
    barrier.waiting.wake();
}

void expect_bytes(Mbarrier& barrier, const Place& place, uint32_t num_bytes) {
    barrier.pending_bytes += num_bytes;
    if (barrier.pending_bytes > kMaxCount) fail("the mbarrier at 0x%x cannot count so many bytes", place.offset);
}

}  // namespace

Mbarrier& mbarrier_at(const Place& place, const char* instruction) {
    const auto found = place.cta->mbarriers.find(place.offset);
    if (found == place.cta->mbarriers.end()) fail("%s: no mbarrier was initialised at 0x%x", instruction, place.offset);
    if (*reinterpret_cast<const uint64_t*>(place.bytes) != kMark)
        fail("%s: the mbarrier at 0x%x was written over", instruction, place.offset);
    return found->second;
}

Place asynchronous_mbarrier(uint32_t address, const char* instruction) {
    const Place place = place_of_barrier(address, instruction);
    if (!mbarrier_at(place, instruction).is_fenced)
        fail("%s: no fence.mbarrier_init after the mbarrier at 0x%x was initialised", instruction, place.offset);
    return place;
}

void arrive(const Place& place, const char* instruction) {
    Mbarrier& barrier = mbarrier_at(place, instruction);
    if (barrier.pending == 0)
        fail("%s: the mbarrier at 0x%x gets more arrivals than the %u that it counts", instruction, place.offset,
             barrier.num_arrivals);
    --barrier.pending;
    complete_phase_if_due(barrier, place);
}

void complete_bytes(const Place& place, uint32_t num_bytes, const char* instruction) {
    Mbarrier& barrier = mbarrier_at(place, instruction);
    barrier.pending_bytes -= num_bytes;
    complete_phase_if_due(barrier, place);
}

}  // namespace emulator

namespace dso::ptx {

using namespace emulator;

uint32_t smem_addr(const void* pointer) { return address_of(pointer); }

void mbarrier_init(uint64_t* barrier, uint32_t num_arrivals) {
    const Place place = place_of_barrier(address_of(barrier), "mbarrier.init");
    if (num_arrivals == 0 || num_arrivals > kMaxCount) fail("mbarrier.init: it cannot count %u arrivals", num_arrivals);
    if (place.cta->mbarriers.count(place.offset)) fail("mbarrier.init: there is an mbarrier at 0x%x", place.offset);
    Mbarrier& state = place.cta->mbarriers[place.offset];
    state.num_arrivals = state.pending = num_arrivals;
    state.initialiser = current;
    *barrier = kMark;
}

void fence_mbarrier_init() {
    for (auto& [offset, barrier] : current->cta->mbarriers) barrier.is_fenced |= barrier.initialiser == current;
}

void mbarrier_arrive(uint64_t* barrier) {
    maybe_pause();
    arrive(place_of_barrier(address_of(barrier), "mbarrier.arrive"), "mbarrier.arrive");
}

void mbarrier_arrive_times(uint64_t* barrier, uint32_t count) {
    maybe_pause();
    const Place place = place_of_barrier(address_of(barrier), "mbarrier.arrive");
    for (uint32_t i = 0; i < count; ++i) arrive(place, "mbarrier.arrive");
}

void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t num_bytes) {
    maybe_pause();
    const char* const name = "mbarrier.arrive.expect_tx";
    const Place place = place_of_barrier(address_of(barrier), name);
    expect_bytes(mbarrier_at(place, name), place, num_bytes);
    arrive(place, name);
}

// As the hardware: one bit tells the phase that runs from the one before, so that parity 1 of a fresh barrier passes.
void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    maybe_pause();
    const char* const name = "mbarrier.try_wait.parity";
    const Place place = place_of_barrier(address_of(barrier), name);
    if (parity > 1) fail("%s: parity %u", name, parity);
    Mbarrier& state = mbarrier_at(place, name);
    state.waiting.wait_with_warp({"the phase of parity %u of the mbarrier at 0x%x", parity, place.offset},
                                 [&state, parity] { return state.num_phases % 2 != parity; });
}

}  // namespace dso::ptx
