#include "kernels/moe_mapping.cuh"

#include <algorithm>

#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/launch.h"
#include "launch/moe_mapping_checks.h"

namespace dso {
namespace {

constexpr int kMaxClusterSize = 8;
constexpr int64_t kPairsOfCta = 4096;  // that one CTA takes before others help it
constexpr int kSharedBytes = 224 * 1024;

}  // namespace
}  // namespace dso

extern "C" dso_status dso_moe_mapping(const dso_expert_rows* rows, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_moe_mapping(*rows));
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    DSO_TRY(allow_shared_memory<moe_mapping_kernel>(device, kSharedBytes));
    const int64_t num_pairs = rows->t * rows->num_topk;
    int cluster_size = 1;
    while (cluster_size < kMaxClusterSize && num_pairs > cluster_size * kPairsOfCta) cluster_size *= 2;
    // A warp for 32 pairs of a CTA and for 32 experts, where there are so many warps and there is room for their
    // counts.
    const int num_experts = static_cast<int>(rows->num_experts);
    const int array_bytes = mapping_pitch(num_experts) * static_cast<int>(sizeof(int));
    const int64_t wanted =
        std::max(ceil_div<int64_t>(num_pairs, 32 * cluster_size), ceil_div<int64_t>(num_experts, 32));
    const int room = kSharedBytes / array_bytes - mapping_arrays(0, cluster_size);
    const int num_warps = static_cast<int>(std::min<int64_t>(wanted, std::min(room, kMappingWarps)));
    const MoeMappingArguments arguments{rows->topk_idx,
                                        rows->token_idx,
                                        rows->row_idx,
                                        rows->offsets,
                                        rows->m_indices,
                                        num_pairs,
                                        rows->num_rows,
                                        align_up<int64_t>(ceil_div<int64_t>(num_pairs, cluster_size * num_warps), 32),
                                        static_cast<int>(rows->num_topk),
                                        num_experts,
                                        static_cast<int>(std::min<int64_t>(rows->alignment, INT32_MAX))};
    return launch_kernel(moe_mapping_kernel,
                         {dim3(static_cast<unsigned>(cluster_size)), dim3(32, static_cast<unsigned>(num_warps)),
                          array_bytes * mapping_arrays(num_warps, cluster_size), stream, cluster_size, true},
                         arguments);
}
