#include "launch/mla_decode_plan.h"

#include <algorithm>

#include "device/math.cuh"

namespace dso {
namespace {

// Microseconds on an H200, by count of bytes and clocks (docs/mla_decode.md).
constexpr double kCta = 4;  // to start, to load q and the first keys, and to store
constexpr double kTileOfTensorCore = 1.4;
constexpr double kTileOfMemory = 72 * 1024 / 4.3e6;  // if no other SM read
constexpr double kCluster = 1;                       // to add up within a cluster
constexpr double kParts = 2.5, kPart = .1;           // to add up several, and each of them

double cost(const MlaDecodeSplits& splits, int64_t num_units, int64_t num_row_tiles, int64_t num_tiles, int num_sms) {
    // A cluster lies within one of the eight groups of SMs, which are not all multiples of its size.
    const int64_t slots =
        splits.cluster_size > 4 ? num_sms / 16 * 16 : num_sms / splits.cluster_size * splits.cluster_size;
    const int64_t num_ctas = num_units * splits.cluster_size * splits.num_parts;
    const int64_t waves = ceil_div(num_ctas, std::max<int64_t>(slots, splits.cluster_size));
    const int64_t tiles = ceil_div<int64_t>(num_tiles, int64_t{splits.cluster_size} * splits.num_parts);
    // The tiles of rows of a request read the same keys, and L2 serves all but the first.
    const double readers = static_cast<double>(std::min(num_ctas, slots)) / static_cast<double>(num_row_tiles);
    const double tile = std::max(kTileOfTensorCore, kTileOfMemory * readers);
    const double combine =
        (splits.cluster_size > 1 ? kCluster : 0) + (splits.num_parts > 1 ? kParts + kPart * splits.num_parts : 0);
    return static_cast<double>(waves) * (kCta + static_cast<double>(tiles) * tile) + combine;
}

}  // namespace

MlaDecodeSplits plan_mla_decode(int64_t num_units, int64_t num_row_tiles, int64_t max_keys, int num_sms) {
    constexpr int64_t kFewTiles = 4;  // not worth sharing; so short sequences get the same bits in every batch
    const int64_t num_tiles = ceil_div<int64_t>(max_keys, 64);
    MlaDecodeSplits best{1, 1};
    if (num_tiles <= kFewTiles || num_units == 0) return best;
    double least = cost(best, num_units, num_row_tiles, num_tiles, num_sms);
    for (int cluster_size = 1; cluster_size <= 8; cluster_size *= 2) {
        for (int num_parts = 1; num_parts == 1 || num_units * cluster_size * num_parts <= num_sms; ++num_parts) {
            if (int64_t{cluster_size} * num_parts > num_tiles) break;
            const MlaDecodeSplits splits{cluster_size, num_parts};
            const double time = cost(splits, num_units, num_row_tiles, num_tiles, num_sms);
            if (time < least) {
                least = time;
                best = splits;
            }
        }
    }
    return best;
}

}  // namespace dso
