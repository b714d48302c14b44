#include "launch/row_checks.h"

namespace dso {

bool is_high_precision(dso_dtype dtype) { return dtype == DSO_BF16 || dtype == DSO_F16 || dtype == DSO_F32; }

bool are_extents(int64_t num_groups, int64_t m, int64_t k, int64_t limit) {
    return num_groups >= 0 && m >= 0 && k >= 0 && k < limit;
}

int size_of(dso_dtype dtype) { return dtype == DSO_F32 ? 4 : 2; }

bool rows_are_aligned(const void* x, dso_dtype dtype, int64_t stride_group, int64_t stride_m) {
    const int64_t size = size_of(dtype);
    return reinterpret_cast<uintptr_t>(x) % 16 == 0 && stride_group * size % 16 == 0 && stride_m * size % 16 == 0;
}

bool is_kv_scale(float kv_scale) { return kv_scale >= 1e-30f && kv_scale <= 1e30f; }

}  // namespace dso
