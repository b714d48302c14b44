// Which rows of A meet which matrix of B: plain data that host and device share.
#pragma once

#include "ptx/types.cuh"

namespace dso {

enum class RowLayout : int {
    kDense,       // all rows meet the only matrix
    kMasked,      // A consists of as many matrices as B: the first layout[i] rows of matrix i meet matrix i
    kOffsets,     // rows layout[i] to layout[i + 1] meet matrix i
    kContiguous,  // row r meets matrix layout[r], the same one within each segment of kSegmentRows
};

inline constexpr int kSegmentRows = 128;

struct RowSchedule {
    RowLayout row_layout;
    const int32_t* layout;
    int num_groups;                         // matrices of B
    int m, n;                               // rows of a matrix of A, rows of a matrix of B
    unsigned long long* counter = nullptr;  // of the tiles that CTAs have drawn (counter.cuh); none: in a fixed order
};

}  // namespace dso
