// The grids of kernels that divide [num_groups, m, k] into patches (device/patch.cuh).
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "device/math.cuh"
#include "device/patch.cuh"

namespace dso {

inline constexpr int64_t kMaxGridY = 65535;  // of y, and of z; kernels go round for more

inline dim3 grid_of(int64_t x, int64_t y, int64_t z) {
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>(std::min(y, kMaxGridY)),
                static_cast<unsigned>(std::min(z, kMaxGridY)));
}

inline dim3 patch_grid(int64_t num_groups, int64_t m, int64_t k, int rows) {
    return grid_of(ceil_div<int64_t>(k, kPatchColumns), ceil_div<int64_t>(m, kPatchWarps * rows), num_groups);
}

/// Whether patches of `rows` rows are enough for the GPU: fewer rows make more CTAs, each with less to load at once.
inline bool fills_the_gpu(int64_t num_groups, int64_t m, int64_t k, int rows, int num_sms) {
    return ceil_div<int64_t>(k, kPatchColumns) * ceil_div<int64_t>(m, kPatchWarps * rows) * num_groups >= 2 * num_sms;
}

/// Groups that follow one another as rows do are rows.
template <typename Extents>
bool groups_are_rows(const Extents& extents, int64_t stride_group, int64_t stride_m) {
    return extents.num_groups == 1 || stride_group == extents.m * stride_m;
}

}  // namespace dso
