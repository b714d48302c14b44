// The K-grouped FP8 GEMM's parameters: plain data that host and device share.
#pragma once

#include "device/direct_output.h"
#include "device/k_group_schedule.h"

namespace dso {

struct KGroupedFp8GemmMaps {
    TensorMap a, b;      // [1, rows, k]
    TensorMap sfa, sfb;  // [1, k / 128, rows], only where the scales come by TMA
    TensorMap d;         // [groups, m, n], only where the epilogue stores by TMA
};

/// One scale per row per 128 columns.
struct RowScales {
    const float* base;
    int64_t stride_row, stride_k;
};

struct KGroupedFp8GemmArguments {
    KGroupSchedule schedule;
    RowScales sfa, sfb;
    bool scales_by_tma;  // else gathered
};

}  // namespace dso
