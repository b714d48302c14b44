#include "launch/bf16_gemm_checks.h"

#include <initializer_list>

#include "launch/status.h"

namespace dso {
namespace {

constexpr int64_t kMaxExtent = (int64_t{1} << 31) - 1024;  // tile arithmetic is in int

/// Whether rows of bfloat16 start at multiples of 16 bytes and are apart. Of an empty matrix nothing is used, and of a
/// single row not the stride: callers leave any number there.
bool are_rows(const void* pointer, int64_t rows, int64_t columns, int64_t stride) {
    if (rows == 0 || columns == 0) return true;
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) return false;
    return rows == 1 || (stride >= columns && stride % 8 == 0);
}

}  // namespace

dso_status check_m_grouped_bf16_gemm(const dso_m_grouped_bf16_gemm& gemm) {
    const auto wrong = [](const char* what) { return fail(DSO_INVALID, "m_grouped_bf16_gemm_nt: %s", what); };
    for (const int64_t extent : {gemm.num_groups, gemm.m, gemm.n, gemm.k}) {
        if (extent < 0 || extent > kMaxExtent) return wrong("an extent is negative, or not below 2^31");
    }
    if (gemm.n % 8 != 0) return wrong("n must be a multiple of 8");
    if (gemm.k % 8 != 0) return wrong("k must be a multiple of 8");
    if (!are_rows(gemm.a, gemm.m, gemm.k, gemm.a_stride)) return wrong("a must have aligned rows");
    if (gemm.num_groups > 0 && !are_rows(gemm.b, gemm.n, gemm.k, gemm.b_stride))
        return wrong("b must have aligned rows");
    if (gemm.num_groups > 1 && gemm.k > 0 && gemm.b_stride_group % 8 != 0) return wrong("b must have aligned matrices");
    if (!are_rows(gemm.d, gemm.m, gemm.n, gemm.d_stride)) return wrong("d must have aligned rows");
    return DSO_OK;
}

}  // namespace dso
