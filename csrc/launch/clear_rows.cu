#include "kernels/clear_rows.cuh"

#include <algorithm>

#include "device/math.cuh"
#include "launch/clear_rows.h"
#include "launch/launch.h"

namespace dso {

dso_status clear_rows(const ClearRowsArguments& arguments, int num_sms, dso_stream stream) {
    const int64_t num_ctas = ceil_div<int64_t>(arguments.num_matrices * arguments.schedule.m, kClearThreads / 32);
    const int grid = static_cast<int>(std::min<int64_t>(num_ctas, num_sms * 8));
    return launch_kernel(clear_rows_kernel, {dim3(grid), dim3(kClearThreads), 0, stream}, arguments);
}

}  // namespace dso
