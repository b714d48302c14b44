#pragma once

#include "kernels/clear_rows_arguments.h"
#include "launch/deepseek_kernels.h"

namespace dso {

/// Launches clear_rows.cuh.
dso_status clear_rows(const ClearRowsArguments& arguments, int num_sms, dso_stream stream);

}  // namespace dso
