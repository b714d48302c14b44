#pragma once

#include "launch/deepseek_kernels.h"

namespace dso {

/// Records the message for dso_last_error and returns `status`.
dso_status fail(dso_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace dso

// Returns from the enclosing function when `expression`, a dso_status, is not DSO_OK.
#define DSO_TRY(expression)                            \
    do {                                               \
        const dso_status dso_status_ = (expression);   \
        if (dso_status_ != DSO_OK) return dso_status_; \
    } while (0)
