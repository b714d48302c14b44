#include "kernels/merge_attn_states.cuh"

#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/launch.h"
#include "launch/merge_attn_states_checks.h"
#include "launch/patch_grid.h"
#include "launch/row_checks.h"
#include "launch/row_threads.h"

namespace dso {
namespace {

using MergeKernel = void (*)(MergeAttnStatesArguments);

MergeKernel select_kernel(dso_dtype dtype, bool vectorized) {
    switch (dtype) {
        case DSO_BF16:
            return vectorized ? merge_attn_states_kernel<__nv_bfloat16, true>
                              : merge_attn_states_kernel<__nv_bfloat16, false>;
        case DSO_F16:
            return vectorized ? merge_attn_states_kernel<__half, true> : merge_attn_states_kernel<__half, false>;
        default:
            return vectorized ? merge_attn_states_kernel<float, true> : merge_attn_states_kernel<float, false>;
    }
}

/// Whether a CTA holds a row at once, and takes it 16 bytes at a time.
bool can_be_vectorized(const dso_attn_states& states) {
    return states.d % kChunk == 0 && states.d <= kMergeThreads * kMergeChunks * kChunk &&
           rows_are_aligned(states.out_a, states.dtype, states.a_stride_group, states.a_stride_m) &&
           rows_are_aligned(states.out_b, states.dtype, states.b_stride_group, states.b_stride_m) &&
           rows_are_aligned(states.out, states.dtype, 0, 0);
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_merge_attn_states(const dso_attn_states* states, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_merge_attn_states(*states));
    if (states->num_groups == 0 || states->m == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    MergeAttnStatesArguments arguments{states->out_a,
                                       states->out_b,
                                       states->lse_a,
                                       states->lse_b,
                                       states->out,
                                       states->lse,
                                       states->a_stride_group,
                                       states->a_stride_m,
                                       states->b_stride_group,
                                       states->b_stride_m,
                                       states->num_groups,
                                       states->m,
                                       states->d,
                                       0};
    if (groups_are_rows(*states, states->a_stride_group, states->a_stride_m) &&
        groups_are_rows(*states, states->b_stride_group, states->b_stride_m)) {
        arguments.m *= arguments.num_groups;
        arguments.num_groups = 1;
    }
    const int64_t places = ceil_div<int64_t>(arguments.d, kMergeChunks * kChunk);
    const dim3 threads = threads_of_rows(places, arguments.m, 1, kMergeThreads);
    const int64_t ctas_per_group = ceil_div<int64_t>(arguments.m, threads.y);
    if (ctas_per_group * arguments.num_groups >= int64_t{1} << 31)
        return fail(DSO_INVALID, "merge_attn_states: more than 2^31 rows");
    arguments.ctas_per_group = static_cast<uint32_t>(ctas_per_group);
    const dim3 grid(static_cast<unsigned>(ctas_per_group * arguments.num_groups));
    return launch_kernel(select_kernel(states->dtype, can_be_vectorized(*states)), {grid, threads, 0, stream},
                         arguments);
}
