// How many CTAs share the keys of a request. Pure arithmetic of the shape, so that a captured graph stays right when
// the lengths change: no length is read.
#pragma once

#include <cstdint>

namespace dso {

struct MlaDecodeSplits {
    int cluster_size;        // CTAs that add up through shared memory: 1, 2, 4 or 8
    int num_parts;           // clusters that add up through global memory
    int tiles_per_part = 0;  // of keys: a request has fewer parts if it has fewer tiles; 0: not so
};

/// For `num_units` tiles of up to `num_rows` rows, `num_row_tiles` of them of the same request, over up to `max_keys`
/// keys of `key_bytes` each.
MlaDecodeSplits plan_mla_decode(int64_t num_units, int64_t num_row_tiles, int64_t num_rows, int64_t max_keys,
                                int64_t key_bytes, int num_sms);

/// By which a request's own length alone says how its keys are shared.
MlaDecodeSplits plan_batch_invariant_mla_decode(int64_t max_keys);

}  // namespace dso
