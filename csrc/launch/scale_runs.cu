#include "launch/scale_runs.h"

#include "device/math.cuh"

namespace dso {

bool are_scale_runs(const ScaleRuns& x) {
    return (x.stride_row == 1 || x.rows == 1) && reinterpret_cast<uintptr_t>(x.base) % 16 == 0 &&
           (x.k <= 128 || (x.stride_k % 4 == 0 && x.stride_k >= x.rows)) &&
           (x.matrices == 1 || x.stride_matrix % 4 == 0);
}

dso_status encode_scale_runs(const ScaleRuns& x, int length, TensorMap* map) {
    return encode_tensor_map(
        {x.base, x.matrices, ceil_div<int64_t>(x.k, 128), x.rows, x.stride_matrix, x.stride_k, 4, 1, length, false},
        map);
}

}  // namespace dso
