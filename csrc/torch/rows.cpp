#include "torch/rows.h"

#include <algorithm>
#include <vector>

#include "device/math.cuh"

namespace dso {
namespace {

constexpr int64_t kBlock = 128;

Tensor empty_of(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype,
                const Tensor& like) {
    return empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype, like);
}

Tensor empty_contiguous(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor& like) {
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t dim = sizes.size() - 1; dim > 0; --dim)
        strides[dim - 1] = strides[dim] * std::max<int64_t>(sizes[dim], 1);
    return empty_of(sizes, strides, dtype, like);
}

}  // namespace

bool has_one_group_stride(const Tensor& x) {
    int64_t expected = -1;  // the stride that the next leading dimension must have, once one has set it
    for (int64_t dim = x.dim() - 3; dim >= 0; --dim) {
        if (x.size(dim) == 1) continue;
        if (expected != -1 && x.stride(dim) != expected) return false;
        expected = x.stride(dim) * x.size(dim);
    }
    return true;
}

Rows rows_of(const Tensor& x) {
    const int64_t dim = x.dim();
    Rows rows{1, dim >= 2 ? x.size(dim - 2) : 1, x.size(dim - 1), 0, dim >= 2 ? x.stride(dim - 2) : 0};
    for (int64_t i = dim - 3; i >= 0; --i) {
        if (x.size(i) != 1 && rows.num_groups == 1) rows.stride_group = x.stride(i);
        rows.num_groups *= x.size(i);
    }
    return rows;
}

Rows single_rows_of(const Tensor& x) {
    const Rows rows = rows_of(x);
    return rows.m == 1 ? Rows{1, rows.num_groups, rows.k, 0, rows.stride_group} : rows;
}

Tensor with_one_group_stride(const Tensor& x) {
    if (has_one_group_stride(x)) return x;
    Tensor copy = empty_rows(x, x.size(x.dim() - 1), x.scalar_type());
    require(aoti_torch_copy_(copy.get(), x.get(), 0) == 0, "could not copy an input");
    return copy;
}

Tensor empty_rows(const Tensor& x, int64_t k, ScalarType dtype) {
    std::vector<int64_t> sizes;
    for (int64_t dim = 0; dim + 1 < x.dim(); ++dim) sizes.push_back(x.size(dim));
    sizes.push_back(k);
    return empty_contiguous(sizes, dtype, x);
}

Tensor empty_scales(const Tensor& x, int64_t k, bool mn_major) {
    const int64_t num_blocks = ceil_div(k, kBlock), last = x.dim() - 1;
    if (!mn_major) return empty_rows(x, num_blocks, ScalarType::Float);
    std::vector<int64_t> sizes(last + 1), strides(last + 1);
    const int64_t column = align_up<int64_t>(x.size(last - 1), 4);
    sizes[last] = num_blocks, strides[last] = column;
    sizes[last - 1] = x.size(last - 1), strides[last - 1] = 1;
    int64_t step = column * num_blocks;
    for (int64_t dim = last - 2; dim >= 0; --dim) {
        sizes[dim] = x.size(dim), strides[dim] = step;
        step *= x.size(dim);
    }
    return empty_of(sizes, strides, ScalarType::Float, x);
}

dso_dtype high_precision_dtype(const Tensor& x, const char* message) {
    const ScalarType dtype = x.scalar_type();
    require(dtype == ScalarType::BFloat16 || dtype == ScalarType::Half || dtype == ScalarType::Float, message);
    return dtype == ScalarType::BFloat16 ? DSO_BF16 : dtype == ScalarType::Half ? DSO_F16 : DSO_F32;
}

}  // namespace dso
