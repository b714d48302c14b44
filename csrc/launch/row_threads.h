// CTAs whose threads are (places in a row, rows, tokens): for kernels that take each row by itself.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "device/math.cuh"

namespace dso {

/// Places of a CTA, where as few as can be share `places` of them evenly.
inline int64_t even_share(int64_t places, int64_t num_threads) {
    return ceil_div(places, ceil_div(std::max<int64_t>(places, 1), num_threads));
}

/// A CTA of at most `num_threads`: a row's places first, then as many rows as there are, then tokens.
inline dim3 threads_of_rows(int64_t places, int64_t rows, int64_t tokens, int64_t num_threads) {
    constexpr int64_t kMaxZ = 64;
    const int64_t x = std::clamp<int64_t>(places, 1, num_threads);
    const int64_t y = std::clamp<int64_t>(rows, 1, num_threads / x);
    const int64_t z = std::clamp<int64_t>(tokens, 1, std::min(num_threads / (x * y), kMaxZ));
    return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

}  // namespace dso
