// The parameters of clear_rows.cuh: plain data that host and device share.
#pragma once

#include "device/row_layout.h"

namespace dso {

struct ClearRowsArguments {
    RowSchedule schedule;
    uint8_t* d;
    int64_t num_matrices, matrix_bytes, row_stride_bytes, row_bytes;
    bool clears_owned;  // else those that are nobody's
};

}  // namespace dso
