#include "torch/tensor.h"

#include <dlfcn.h>

#include <stdexcept>

namespace dso {

void require(bool condition, const char* message) {
    if (!condition) throw std::runtime_error(message);
}

void require_ok(dso_status status) { require(status == DSO_OK, dso_last_error()); }

dso_stream current_stream(int32_t device) {
    // The function lives in the CUDA half of torch. Looked up at run time, in the library that torch has loaded: a
    // CPU-only torch has no such symbol, and this library must load there, too.
    using GetStream = AOTITorchError (*)(int32_t, void**);
    static const auto get = [] {
        void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        return reinterpret_cast<GetStream>(torch_cuda ? dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream")
                                                      : nullptr);
    }();
    void* stream = nullptr;
    require(get && get(device, &stream) == 0, "could not get torch's current CUDA stream");
    return stream;
}

Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType dtype, const Tensor& like) {
    // The C shim: torch::stable::empty and its kin look their op up by name at each call (0.45 us).
    int32_t device_type;
    AtenTensorHandle handle;
    const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
    require(aoti_torch_get_device_type(like.get(), &device_type) == 0 &&
                aoti_torch_empty_strided(dim, sizes, strides, type, device_type, like.get_device_index(), &handle) == 0,
            "could not allocate an output");
    return Tensor(handle);
}

Tensor empty_strided(std::initializer_list<int64_t> sizes, std::initializer_list<int64_t> strides, ScalarType dtype,
                     const Tensor& like) {
    return empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides.begin(), dtype, like);
}

bool is_tensor_of(const Tensor& x, ScalarType dtype, const Tensor& like, std::initializer_list<int64_t> sizes) {
    if (x.scalar_type() != dtype || x.dim() != static_cast<int64_t>(sizes.size())) return false;
    if (x.is_cpu() != like.is_cpu() || x.get_device_index() != like.get_device_index()) return false;
    int64_t dim = 0;
    for (const int64_t size : sizes) {
        if (size != -1 && x.size(dim) != size) return false;
        ++dim;
    }
    return true;
}

bool has_contiguous_rows(const Tensor& x) { return x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1; }

int64_t stride_of(const Tensor& x, int64_t dim) { return x.size(dim) > 1 ? x.stride(dim) : 0; }

bool are_apart(const Tensor& x, const Tensor& y) {
    const auto end = [](const Tensor& t) {
        int64_t last = 0;
        for (int64_t dim = 0; dim < t.dim(); ++dim) last += (t.size(dim) - 1) * t.stride(dim);
        return static_cast<const char*>(t.const_data_ptr()) + (last + 1) * t.element_size();
    };
    return x.numel() == 0 || y.numel() == 0 || end(x) <= static_cast<const char*>(y.const_data_ptr()) ||
           end(y) <= static_cast<const char*>(x.const_data_ptr());
}

}  // namespace dso
