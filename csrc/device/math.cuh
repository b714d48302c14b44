// Integer arithmetic that host planners and kernels share.
#pragma once

#include "ptx/types.cuh"

namespace dso {

template <typename T>
DSO_HOST_DEVICE constexpr T ceil_div(T x, T y) {
    return (x + y - 1) / y;
}

template <typename T>
DSO_HOST_DEVICE constexpr T align_up(T x, T y) {
    return ceil_div(x, y) * y;
}

}  // namespace dso
