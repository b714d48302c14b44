// Which kernel decodes, and how many CTAs share the keys of a tile of rows. Pure arithmetic of the shape, so that a
// captured graph stays right when the lengths change: no length is read.
#pragma once

#include <cstdint>

namespace dso {

inline constexpr int kMlaManyRowsTile = 64, kMlaFewRowsTile = 16;  // rows of the kernels' tiles

/// The extents of a call.
struct MlaDecodeShape {
    int64_t num_requests, num_queries;  // queries of each request; of ragged ones, of all together
    int64_t num_heads;
    bool is_ragged;
    int64_t max_keys, key_bytes;  // of a request, of a key in the cache

    /// Rows, which are (query, head) pairs, of a request; of ragged queries, on average.
    int64_t num_rows() const;
    /// Tiles of rows of a request; of ragged queries, on average.
    int64_t num_row_tiles(int tile_rows) const;
    /// Those of all requests; of ragged queries, if they are spread evenly and no request is without.
    int64_t num_units(int tile_rows) const;
    /// The most that there can be, however they are spread: up to twice as many, and one.
    int64_t max_units(int tile_rows) const;
};

struct MlaDecodePlan {
    int cluster_size;    // CTAs that add up through shared memory: 1, 2, 4 or 8
    int num_parts;       // clusters that add up through global memory
    int tiles_per_part;  // of keys: a request has fewer parts if it has fewer tiles; 0: not so
    int tile_rows;       // 64 or 16
};

MlaDecodePlan plan_mla_decode(const MlaDecodeShape& shape, int num_sms);

/// By which a request's own length and the number of heads alone say how it is decoded.
MlaDecodePlan plan_batch_invariant_mla_decode(const MlaDecodeShape& shape);

}  // namespace dso
