#pragma once

#include "launch/deepseek_kernels.h"

namespace dso {

/// Whether the norm is within contract; DSO_INVALID names the argument that is not.
dso_status check_rms_norm(const dso_norm& norm);

/// How a row is divided among threads: a function of d alone, because the order of its sum follows from it.
struct RmsNormShape {
    int num_threads, num_chunks;  // of a row, of a thread
    bool is_one_panel;            // the threads hold the whole row at once
};
RmsNormShape rms_norm_shape(int64_t d);

}  // namespace dso
