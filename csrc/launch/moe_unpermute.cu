#include "kernels/moe_unpermute.cuh"

#include "launch/cuda_check.h"
#include "launch/device_info.h"
#include "launch/launch.h"
#include "launch/moe_unpermute_checks.h"
#include "launch/patch_grid.h"
#include "launch/row_checks.h"
#include "launch/row_threads.h"

namespace dso {
namespace {

using UnpermuteKernel = void (*)(MoeUnpermuteArguments);

UnpermuteKernel select_kernel(dso_dtype dtype, bool vectorized) {
    switch (dtype) {
        case DSO_BF16:
            return vectorized ? moe_unpermute_kernel<__nv_bfloat16, true> : moe_unpermute_kernel<__nv_bfloat16, false>;
        case DSO_F16:
            return vectorized ? moe_unpermute_kernel<__half, true> : moe_unpermute_kernel<__half, false>;
        default:
            return vectorized ? moe_unpermute_kernel<float, true> : moe_unpermute_kernel<float, false>;
    }
}

}  // namespace
}  // namespace dso

extern "C" dso_status dso_moe_unpermute(const dso_row_sum* sum, dso_stream stream) {
    using namespace dso;
    DSO_TRY(check_moe_unpermute(*sum));
    if (sum->t == 0 || sum->d == 0) return DSO_OK;
    int device, num_sms;
    DSO_TRY(current_device(&device, &num_sms));
    const MoeUnpermuteArguments arguments{sum->y,   sum->row_idx,  sum->topk_weights,
                                          sum->out, sum->num_rows, sum->t,
                                          sum->d,   sum->y_stride, static_cast<int>(sum->num_topk)};
    const bool vectorized = sum->d % kChunk == 0 && rows_are_aligned(sum->y, sum->dtype, 0, sum->y_stride) &&
                            rows_are_aligned(sum->out, sum->dtype, 0, 0);
    const int64_t chunks = ceil_div<int64_t>(sum->d, kChunk);
    const dim3 threads = threads_of_rows(even_share(chunks, kUnpermuteThreads), sum->t, 1, kUnpermuteThreads);
    const dim3 grid = grid_of(ceil_div<int64_t>(sum->t, threads.y), ceil_div<int64_t>(chunks, threads.x), 1);
    return launch_kernel(select_kernel(sum->dtype, vectorized), {grid, threads, 0, stream, 1, true}, arguments);
}
