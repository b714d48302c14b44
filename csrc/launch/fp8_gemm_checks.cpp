#include "launch/fp8_gemm_checks.h"

#include "launch/status.h"

namespace dso {
namespace {

constexpr int64_t kMaxExtent = (int64_t{1} << 31) - 1024;  // tile arithmetic is in int
constexpr int64_t kMaxOutput = int64_t{1} << 42;           // so that a count of tiles of 64 x 64 is an int

/// Whether TMA can walk the rows: aligned to 16 bytes, and apart. Of an empty matrix nothing is used, and of a single
/// row not the stride: callers leave any number there.
bool are_tma_rows(const void* pointer, int64_t rows, int64_t columns, int64_t stride, int element_bytes) {
    if (rows == 0 || columns == 0) return true;
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
    return rows <= 1 || (stride >= columns && stride * element_bytes % 16 == 0);
}

/// Whether the output's matrices are aligned to 16 bytes, and apart.
bool are_matrices_apart(const dso_fp8_gemm& gemm, int64_t num_groups, int64_t stride_group) {
    if (num_groups <= 1 || gemm.m == 0 || gemm.n == 0) return true;
    const int64_t alignment = gemm.d_dtype == DSO_BF16 ? 8 : 4;  // elements of 16 bytes
    const int64_t extent = gemm.m > 1 ? (gemm.m - 1) * gemm.d_stride + gemm.n : gemm.n;
    return stride_group % alignment == 0 && stride_group >= extent;
}

}  // namespace

dso_status check_fp8_gemm(const dso_fp8_gemm& gemm) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "fp8_gemm_nt: %s", what); };
    if (gemm.m < 0 || gemm.n < 0 || gemm.k < 0) return wrong("m, n and k must not be negative");
    if (gemm.m > kMaxExtent || gemm.n > kMaxExtent || gemm.k > kMaxExtent)
        return wrong("m, n and k must be below 2^31");
    if (gemm.m * gemm.n > kMaxOutput) return wrong("the output must have at most 2^42 elements");
    if (gemm.n % 8 != 0) return wrong("n must be a multiple of 8");
    if (gemm.k % 16 != 0) return wrong("k must be a multiple of 16");
    if (gemm.d_dtype != DSO_BF16 && gemm.d_dtype != DSO_F32) return wrong("d must be bfloat16 or float32");
    if (!are_tma_rows(gemm.a, gemm.m, gemm.k, gemm.a_stride, 1)) return wrong("a must have aligned rows");
    if (!are_tma_rows(gemm.b, gemm.n, gemm.k, gemm.b_stride, 1)) return wrong("b must have aligned rows");
    if (!are_tma_rows(gemm.d, gemm.m, gemm.n, gemm.d_stride, gemm.d_dtype == DSO_BF16 ? 2 : 4))
        return wrong("d must have aligned rows");
    return DSO_OK;
}

dso_status check_m_grouped_fp8_gemm(const dso_m_grouped_fp8_gemm& group) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "m_grouped_fp8_gemm_nt: %s", what); };
    DSO_TRY(check_fp8_gemm(group.gemm));
    if (group.num_groups < 0 || group.num_groups > kMaxExtent) return wrong("the number of groups must be below 2^31");
    if (group.num_groups > 1 && group.gemm.k > 0 && group.b_stride_group % 16 != 0)
        return wrong("b must have aligned matrices");
    if (group.expected_m < 1) return wrong("expected_m must be at least 1");
    switch (group.row_layout) {
        case DSO_ROWS_MASKED:
            if (group.num_groups > 1 && group.gemm.m > 0 && group.gemm.k > 0 && group.a_stride_group % 16 != 0)
                return wrong("a must have aligned matrices");
            if (!are_matrices_apart(group.gemm, group.num_groups, group.d_stride_group))
                return wrong("d must have aligned matrices, apart from each other");
            return DSO_OK;
        case DSO_ROWS_OFFSETS:
        case DSO_ROWS_CONTIGUOUS:
            return DSO_OK;
    }
    return wrong("no such layout");
}

dso_status check_k_grouped_fp8_gemm(const dso_k_grouped_fp8_gemm& group) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "k_grouped_fp8_gemm_nt: %s", what); };
    DSO_TRY(check_fp8_gemm(group.gemm));
    if (group.gemm.k % 128 != 0) return wrong("k must be a multiple of 128");
    if (group.num_groups < 0 || group.num_groups > kMaxExtent) return wrong("the number of groups must be below 2^31");
    if (!are_matrices_apart(group.gemm, group.num_groups, group.d_stride_group))
        return wrong("d must have aligned matrices, apart from each other");
    return DSO_OK;
}

}  // namespace dso
