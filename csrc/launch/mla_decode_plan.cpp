#include "launch/mla_decode_plan.h"

#include <algorithm>

#include "device/math.cuh"

namespace dso {
namespace {

constexpr int kTileKeys = 64, kWarps = 12, kGroups = 64, kPartsAtOnce = 8;  // see kernels/mla_decode_combination.cuh

/// What a kernel's time consists of, in microseconds and bytes per microsecond: fitted to the times of many plans on an
/// H200 (docs/mla_decode.md).
struct Kernel {
    int tile_rows;
    double cta;                     // to start, to load q and the first keys, and to store
    double tile, fp8_tile;          // of keys that are there
    double memory, l2;              // that arrive: from memory, from L2
    double round, source_of_round;  // to add up what the warps of a cluster have at a time
    double parts, parts_of_round;   // to wait for eight parts (one value, as it is one code), and to add them up
};

constexpr Kernel kKernels[] = {
    {kMlaFewRowsTile, 4.54, 1.1, 1.19, 4.27e6, 8.6e6, .722, .0048, 1.8, .283},
    {kMlaManyRowsTile, 6.58, 1.63, 2.17, 4.58e6, 5.68e6, .347, .158, 1.8, .344},
};

bool is_fp8(const MlaDecodeShape& shape) { return shape.key_bytes < 1024; }

double cost(const MlaDecodeShape& shape, int size, int num_parts, const Kernel& kernel, int num_sms) {
    // A cluster lies within one of the groups of SMs, which are not all multiples of its size: of 132 SMs 120 find
    // their place in clusters of 4 or 8.
    const int64_t usable = size > 2 ? num_sms * 10 / 11 : num_sms,
                  slots = std::max<int64_t>(usable / size * size, size);
    const int64_t num_units = shape.num_units(kernel.tile_rows), num_ctas = num_units * size * num_parts;
    const int64_t num_tiles = ceil_div<int64_t>(shape.max_keys, kTileKeys);
    const auto most_tiles = static_cast<double>(ceil_div(num_tiles, int64_t{size} * num_parts));
    const auto running = static_cast<double>(std::min(num_ctas, slots));
    // Once more than half of the SMs have a CTA, a tile takes longer than equal shares of memory's bandwidth explain:
    // as if two SMs of a TPC got less each than one whose neighbour is idle, and the call waited for them. The mean of
    // equal shares for CTAs and for TPCs suits the times; where CTAs ran was not measured.
    const auto alone = static_cast<double>(std::max<int64_t>(usable / 2 / size * size, size));
    const double crowd = running > alone ? (running + 2. * alone) / 2. : running;
    // The tiles of rows of a request read the same keys, and L2 serves all but the first.
    const double readers = crowd / static_cast<double>(shape.num_row_tiles(kernel.tile_rows));
    const double bytes = kTileKeys * static_cast<double>(shape.key_bytes);
    const double tile = std::max(
        {is_fp8(shape) ? kernel.fp8_tile : kernel.tile, bytes * readers / kernel.memory, bytes * running / kernel.l2});
    double time = static_cast<double>(ceil_div(num_ctas, slots)) * (kernel.cta + most_tiles * tile);
    if (size == 1 && num_parts == 1) return time;
    const int64_t row_warps = ceil_div<int64_t>(std::min<int64_t>(shape.num_rows(), kernel.tile_rows), 16);
    const auto rounds = static_cast<double>(ceil_div<int64_t>(kGroups / size * row_warps, kWarps));
    time += rounds * (kernel.round + kernel.source_of_round * size);
    if (num_parts > 1)
        time +=
            static_cast<double>(ceil_div(num_parts, kPartsAtOnce)) * (kernel.parts + kernel.parts_of_round * rounds);
    return time;
}

int tile_rows_for(int64_t num_rows) { return num_rows <= kMlaFewRowsTile ? kMlaFewRowsTile : kMlaManyRowsTile; }

}  // namespace

int64_t MlaDecodeShape::num_rows() const {
    return (is_ragged ? ceil_div(num_queries, std::max<int64_t>(num_requests, 1)) : num_queries) * num_heads;
}

int64_t MlaDecodeShape::num_row_tiles(int tile_rows) const { return ceil_div<int64_t>(num_rows(), tile_rows); }

int64_t MlaDecodeShape::num_units(int tile_rows) const {
    if (!is_ragged) return num_requests * num_row_tiles(tile_rows);
    const int64_t b = std::max<int64_t>(num_requests, 1), fewest = num_queries / b, num_with_more = num_queries % b;
    const auto tiles_of = [&](int64_t queries) {
        return ceil_div<int64_t>(std::max<int64_t>(queries * num_heads, 1), tile_rows);
    };
    return (b - num_with_more) * tiles_of(fewest) + num_with_more * tiles_of(fewest + 1);
}

int64_t MlaDecodeShape::max_units(int tile_rows) const {
    if (!is_ragged) return num_units(tile_rows);
    // Each request, and the rows before and after those of all, may begin a tile that it does not fill.
    return ceil_div<int64_t>(num_queries * num_heads, tile_rows) + num_requests + 1;
}

MlaDecodePlan plan_mla_decode(const MlaDecodeShape& shape, int num_sms) {
    constexpr int64_t kFewTiles = 4;  // not worth sharing; so short sequences get the same bits in every batch
    const int64_t num_tiles = ceil_div<int64_t>(shape.max_keys, kTileKeys);
    MlaDecodePlan best{1, 1, 0, tile_rows_for(shape.num_rows())};
    if (num_tiles <= kFewTiles || shape.num_units(best.tile_rows) == 0) return best;
    double least = -1.;
    for (const Kernel& kernel : kKernels) {
        const int64_t num_units = shape.num_units(kernel.tile_rows);
        for (int size = 1; size <= 8; size *= 2) {
            for (int parts = 1; parts == 1 || num_units * size * parts <= num_sms; ++parts) {
                if (int64_t{size} * parts > num_tiles) break;
                const double time = cost(shape, size, parts, kernel, num_sms);
                if (least >= 0. && time >= least) continue;
                least = time;
                best = {size, parts, 0, kernel.tile_rows};
            }
        }
    }
    return best;
}

// A CTA gets 8 tiles, so that little of its time is its start, until a request has 32 CTAs; from there on they get
// more. The grid has room for all parts of all requests, and those that a short one does not have return at once: more
// of them would cost a batch of short requests in a wide table more than they save a long one. A ragged request's own
// number of queries is not known, so only that of heads can choose the kernel.
MlaDecodePlan plan_batch_invariant_mla_decode(const MlaDecodeShape& shape) {
    constexpr int kClusterSize = 2, kTilesPerPart = 16, kMostParts = 16;
    const int64_t parts = ceil_div<int64_t>(ceil_div<int64_t>(shape.max_keys, kTileKeys), kTilesPerPart);
    return {kClusterSize, static_cast<int>(std::clamp<int64_t>(parts, 1, kMostParts)), kTilesPerPart,
            tile_rows_for(shape.num_heads)};
}

}  // namespace dso
