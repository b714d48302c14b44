// The FP8 GEMM kernels' parameters: plain data that host and device share.
#pragma once

#include "device/direct_output.h"
#include "device/row_layout.h"

namespace dso {

inline constexpr int kMaxBoxes = 3;

struct Fp8GemmMaps {
    TensorMap a, b;     // [matrices, rows, k]
    TensorMap sfa;      // [matrices, ceil(k / 128), rows], only where sfa comes by TMA
    TensorMap d;        // [matrices, m, n], only where the epilogue stores by TMA
    TensorMap other_a;  // a in boxes of a tile's rows if those of `a` are lower, or else of a wide tile's
    TensorMap wide_b;   // b in boxes of a wide tile's columns, only of the dense kernel
};

struct Fp8GemmArguments {
    RowSchedule schedule;
    int k;
    int a_box_rows;       // what map a loads at a time: a kMaxBoxes-th of a tile's rows, or more
    int b_box_rows;       // what map b does: a tile's columns, or half of them where tiles may be so narrow
    bool has_high_boxes;  // other_a loads a tile's rows
    bool has_wide_tiles;  // the dense kernel's: other_a loads those of such tiles
    bool sfa_by_tma;      // else gathered
    bool b_is_constant;   // b may be read before the grids that this one depends on have ended
    const float* sfa;     // [a matrices, m, ceil(k / 128)], strides below
    const float* sfb;     // [b matrices, ceil(n / 128), ceil(k / 128)], strides below
    int64_t sfa_stride_matrix, sfa_stride_m, sfa_stride_k;
    int64_t sfb_stride_matrix, sfb_stride_n, sfb_stride_k;
    int num_shared_tiles;  // that CTAs compute step by step, only of the dense kernel (stream_k.cuh)
    float* left_sums;      // [CTAs, warps, sums of a lane, 32], only where tiles are shared
    uint64_t* left;        // [CTAs, warps], of any content, likewise
};

}  // namespace dso
