#include "ptx/cluster.cuh"

#include <cstring>

#include "mbarrier.h"

namespace emulator {
namespace {

/// That which counts the bytes that arrive at `place`.
Place mbarrier_of(const Place& place, uint32_t address, const char* instruction) {
    const Place barrier = asynchronous_mbarrier(address, instruction);
    if (barrier.cta != place.cta) fail("%s: the mbarrier is in another CTA than the destination", instruction);
    return barrier;
}

}  // namespace
}  // namespace emulator

namespace dso::ptx {

using namespace emulator;

uint32_t cluster_size() { return static_cast<uint32_t>(current->cta->cluster->ctas.size()); }
uint32_t cluster_rank() { return current->cta->rank; }

void cluster_arrive() {
    meet("barrier.cluster.arrive");
    Thread& thread = *current;
    Cluster& cluster = *thread.cta->cluster;
    if (thread.has_arrived_at_cluster) fail("barrier.cluster.arrive twice, with no barrier.cluster.wait between");
    thread.has_arrived_at_cluster = true;
    thread.cluster_phase = cluster.num_phases;
    ++cluster.arrived;
    complete_cluster_phase_if_due(cluster);
}

void cluster_wait() {
    meet("barrier.cluster.wait");
    Thread& thread = *current;
    Cluster& cluster = *thread.cta->cluster;
    if (!thread.has_arrived_at_cluster) fail("barrier.cluster.wait without barrier.cluster.arrive");
    while (cluster.num_phases == thread.cluster_phase) cluster.waiting.wait({"barrier.cluster"});
    thread.has_arrived_at_cluster = false;
}

uint32_t cluster_address(const void* pointer, uint32_t rank) {
    const uint32_t offset = address_of(pointer) & ((1u << kRankShift) - 1);
    if (rank >= cluster_size()) fail("mapa: CTA %u of a cluster of %u", rank, cluster_size());
    return rank << kRankShift | offset;
}

float4 load_from_cluster(uint32_t address) {
    maybe_pause();
    const char* const name = "ld.shared::cluster";
    float4 x;
    if (address % sizeof(x) != 0) fail("%s: 0x%x is not aligned to %zu bytes", name, address, sizeof(x));
    memcpy(&x, place_of(address, sizeof(x), name).bytes, sizeof(x));
    return x;
}

void copy_to_cluster_async(uint32_t destination, const void* source, uint32_t num_bytes, uint32_t barrier) {
    maybe_pause();
    const char* const name = "cp.async.bulk";
    if (cluster_size() == 1) fail("%s between CTAs, but the launch named no cluster", name);
    const uint32_t from = address_of(source);
    if (destination % 16 != 0 || from % 16 != 0 || num_bytes % 16 != 0)
        fail("%s: %u bytes from 0x%x to 0x%x, not all multiples of 16", name, num_bytes, from, destination);
    const Place to = place_of(destination, num_bytes, name), read = place_of(from, num_bytes, name);
    const Place at = mbarrier_of(to, barrier, name);
    memset(to.bytes, kPoison, num_bytes);
    start(name, read.cta, [=] {
        if (to.cta->shared == nullptr) fail("%s: CTA %u, where it goes, has ended", name, to.cta->index.x);
        memcpy(to.bytes, read.bytes, num_bytes);
        complete_bytes(at, num_bytes, name);
    });
}

}  // namespace dso::ptx
