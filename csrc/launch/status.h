#pragma once

#include "launch/deepseek_kernels.h"

namespace dso {

/// Records the message for dso_last_error and returns `status`.
dso_status fail(dso_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace dso
