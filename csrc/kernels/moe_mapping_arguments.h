// The parameters of the kernel that orders pairs by expert: plain data that host and device share.
#pragma once

#include "device/math.cuh"

namespace dso {

struct MoeMappingArguments {
    const int32_t* topk_idx;  // [num_pairs]
    int32_t* token_idx;       // [num_rows]
    int32_t* row_idx;         // [num_pairs]
    int32_t* offsets;         // [num_experts + 1]
    int32_t* m_indices;       // [num_rows]
    int64_t num_pairs, num_rows;
    int64_t pairs_of_run;  // a multiple of 32
    int num_topk, num_experts, alignment;
};

/// Words of an array with an element for each expert, in whole vectors of 16 bytes.
DSO_HOST_DEVICE int mapping_pitch(int num_experts) { return align_up(num_experts, 4); }

/// Arrays of a CTA in shared memory: the counts of each of its runs and of each CTA; the first row, the last and the
/// next expert's.
DSO_HOST_DEVICE int mapping_arrays(int num_runs, int cluster_size) { return num_runs + cluster_size + 3; }

}  // namespace dso
