#include "launch/mla_decode_plan.h"

#include <algorithm>

#include "device/math.cuh"

namespace dso {
namespace {

// Microseconds, fitted to plans measured on an H200 (docs/mla_decode.md).
constexpr double kCta = 6.5;  // to start, to load q and the first keys, and to store
constexpr double kTileOfTensorCore = 1.8;
constexpr double kTileKeys = 64, kBytesOfMemory = 4.25e6;   // that arrive at one SM if no other reads
constexpr double kRound = .25, kSourceOfRound = .19;        // to add up what the warps of a cluster have at a time
constexpr double kParts = 1.5, kPartsOfRound = .85;         // to add up several parts, and eight of them at a time
constexpr int kWarps = 12, kGroups = 64, kPartsAtOnce = 8;  // see kernels/sm90_mla_decode.cuh

struct Problem {
    int64_t num_units, num_row_tiles, num_row_warps, num_tiles, key_bytes;
    int num_sms;
};

double cost(const MlaDecodeSplits& splits, const Problem& problem) {
    const int64_t size = splits.cluster_size, num_parts = splits.num_parts;
    // A cluster lies within one of the groups of SMs, which are not all multiples of its size: of 132 SMs 120 find
    // their place in clusters of 4 or 8.
    const int64_t usable = size > 2 ? problem.num_sms * 10 / 11 : problem.num_sms;
    const int64_t slots = std::max(usable / size * size, size);
    const int64_t num_ctas = problem.num_units * size * num_parts;
    const int64_t waves = ceil_div(num_ctas, slots);
    const int64_t tiles = ceil_div(problem.num_tiles, size * num_parts);
    // The tiles of rows of a request read the same keys, and L2 serves all but the first.
    const double readers = static_cast<double>(std::min(num_ctas, slots)) / static_cast<double>(problem.num_row_tiles);
    const double tile_of_memory = kTileKeys * static_cast<double>(problem.key_bytes) / kBytesOfMemory;
    const double tile = std::max(kTileOfTensorCore, tile_of_memory * readers);
    double time = static_cast<double>(waves) * (kCta + static_cast<double>(tiles) * tile);
    if (size == 1 && num_parts == 1) return time;
    const auto rounds = static_cast<double>(ceil_div(kGroups / size * problem.num_row_warps, int64_t{kWarps}));
    time += rounds * (kRound + kSourceOfRound * static_cast<double>(size));
    if (num_parts > 1)
        time += kParts + kPartsOfRound * rounds * static_cast<double>(ceil_div(num_parts, int64_t{kPartsAtOnce}));
    return time;
}

}  // namespace

MlaDecodeSplits plan_mla_decode(int64_t num_units, int64_t num_row_tiles, int64_t num_rows, int64_t max_keys,
                                int64_t key_bytes, int num_sms) {
    constexpr int64_t kFewTiles = 4;  // not worth sharing; so short sequences get the same bits in every batch
    const Problem problem{num_units, num_row_tiles, ceil_div<int64_t>(num_rows, 16), ceil_div<int64_t>(max_keys, 64),
                          key_bytes, num_sms};
    MlaDecodeSplits best{1, 1, 0};
    if (problem.num_tiles <= kFewTiles || num_units == 0) return best;
    double least = cost(best, problem);
    for (int cluster_size = 1; cluster_size <= 8; cluster_size *= 2) {
        for (int num_parts = 1; num_parts == 1 || num_units * cluster_size * num_parts <= num_sms; ++num_parts) {
            if (int64_t{cluster_size} * num_parts > problem.num_tiles) break;
            const MlaDecodeSplits splits{cluster_size, num_parts, 0};
            const double time = cost(splits, problem);
            if (time < least) {
                least = time;
                best = splits;
            }
        }
    }
    return best;
}

// A CTA gets 8 tiles, so that little of its time is its start, until a request has 32 CTAs; from there on they get
// more. The grid has room for all parts of all requests, and those that a short one does not have return at once: more
// of them would cost a batch of short requests in a wide table more than they save a long one.
MlaDecodeSplits plan_batch_invariant_mla_decode(int64_t max_keys) {
    constexpr int kClusterSize = 2, kTilesPerPart = 16, kMostParts = 16;
    const int64_t parts = ceil_div<int64_t>(ceil_div<int64_t>(max_keys, 64), kTilesPerPart);
    return {kClusterSize, static_cast<int>(std::clamp<int64_t>(parts, 1, kMostParts)), kTilesPerPart};
}

}  // namespace dso
