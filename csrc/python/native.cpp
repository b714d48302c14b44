// The torch-free door: how the library was built, what its planners choose, and the kernels on any array that speaks
// __cuda_array_interface__ (CuPy, Numba, torch) or __array_interface__ (NumPy). Arrays are borrowed for the call.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "launch/deepseek_kernels.h"
#include "launch/fp8_gemm_config.h"

namespace py = pybind11;

namespace {

/// An array's memory, read from its array interface. Strides are in elements.
struct View {
    std::string name, type;  // the argument's name; the interface's typestr without its byte order, say "f4"
    uintptr_t data;
    std::vector<int64_t> shape, strides;
    bool is_cuda;
};

[[noreturn]] void wrong(const std::string& name, const std::string& wanted) {
    throw py::value_error(name + " must be " + wanted);
}

std::vector<int64_t> strides_of(const py::dict& interface, const std::vector<int64_t>& shape, int64_t element_bytes) {
    std::vector<int64_t> strides(shape.size());
    if (interface.contains("strides") && !interface["strides"].is_none()) {
        strides = interface["strides"].cast<std::vector<int64_t>>();
        for (int64_t& stride : strides) stride /= element_bytes;
    } else {
        int64_t step = 1;
        for (size_t i = shape.size(); i-- > 0; step *= shape[i]) strides[i] = step;
    }
    return strides;
}

View view(const py::handle& array, const std::string& name, bool is_written = false) {
    const bool is_cuda = py::hasattr(array, "__cuda_array_interface__");
    const char* attribute = is_cuda ? "__cuda_array_interface__" : "__array_interface__";
    if (!py::hasattr(array, attribute)) throw py::type_error(name + " must be a CUDA or NumPy array");
    const auto interface = array.attr(attribute).cast<py::dict>();
    const auto [data, is_read_only] = interface["data"].cast<std::pair<uintptr_t, bool>>();
    if (is_written && is_read_only) wrong(name, "writable");
    const auto typestr = interface["typestr"].cast<std::string>();
    auto shape = interface["shape"].cast<std::vector<int64_t>>();
    auto strides = strides_of(interface, shape, std::stoll(typestr.substr(2)));
    return {name, typestr.substr(1), data, std::move(shape), std::move(strides), is_cuda};
}

void require_shape(const View& x, const std::vector<int64_t>& shape) {
    if (x.shape == shape) return;
    std::string wanted;
    for (const int64_t extent : shape) wanted += (wanted.empty() ? "" : ", ") + std::to_string(extent);
    wrong(x.name, "of shape [" + wanted + "]");
}

void require_matrix(const View& x) {
    if (x.shape.size() != 2) wrong(x.name, "a matrix");
}

void require_contiguous_rows(const View& x) {
    if (x.shape.back() > 1 && x.strides.back() != 1) wrong(x.name, "contiguous in its last dimension");
}

void require_type(const View& x, std::initializer_list<const char*> types, const char* wanted) {
    for (const char* type : types) {
        if (x.type == type) return;
    }
    throw py::type_error(x.name + " must be " + wanted + ", got " + x.type);
}

void require_same_memory(const View& first, std::initializer_list<const View*> others) {
    for (const View* other : others) {
        if (other->is_cuda != first.is_cuda) wrong(other->name, "on the same device as " + first.name);
    }
}

/// bfloat16 has no typestr of its own: NumPy's extension type says V2, and its bits are 16-bit integers.
bool is_bf16(const View& x) { return x.type == "V2" || x.type == "u2" || x.type == "i2"; }

void require_ok(dso_status status) {
    if (status == DSO_INVALID) throw py::value_error(dso_last_error());
    if (status != DSO_OK) throw std::runtime_error(dso_last_error());
}

dso_stream as_stream(uintptr_t stream) { return reinterpret_cast<dso_stream>(stream); }

int64_t blocks(int64_t extent) { return (extent + 127) / 128; }

void fp8_gemm_nt(const py::object& a_, const py::object& sfa_, const py::object& b_, const py::object& sfb_,
                 const py::object& out_, bool accumulate, uintptr_t stream) {
    const View a = view(a_, "a"), sfa = view(sfa_, "sfa"), b = view(b_, "b"), sfb = view(sfb_, "sfb");
    const View out = view(out_, "out", true);
    require_matrix(a);
    require_matrix(b);
    require_type(a, {"u1", "i1", "V1"}, "e4m3 as 8-bit elements");
    require_type(b, {"u1", "i1", "V1"}, "e4m3 as 8-bit elements");
    require_type(sfa, {"f4"}, "float32");
    require_type(sfb, {"f4"}, "float32");
    require_type(out, {"f4", "V2", "u2", "i2"}, "float32, or bfloat16 as 16-bit elements");
    const int64_t m = a.shape[0], n = b.shape[0], k = a.shape[1];
    require_shape(b, {n, k});
    require_shape(sfa, {m, blocks(k)});
    require_shape(sfb, {blocks(n), blocks(k)});
    require_shape(out, {m, n});
    for (const View* x : {&a, &b, &out}) require_contiguous_rows(*x);
    require_same_memory(a, {&sfa, &b, &sfb, &out});

    const dso_fp8_gemm gemm{reinterpret_cast<const void*>(a.data),
                            reinterpret_cast<const float*>(sfa.data),
                            reinterpret_cast<const void*>(b.data),
                            reinterpret_cast<const float*>(sfb.data),
                            reinterpret_cast<void*>(out.data),
                            m,
                            n,
                            k,
                            a.strides[0],
                            b.strides[0],
                            out.strides[0],
                            sfa.strides[0],
                            sfa.strides[1],
                            sfb.strides[0],
                            sfb.strides[1],
                            is_bf16(out) ? DSO_BF16 : DSO_F32,
                            accumulate,
                            false,
                            false,
                            nullptr};
    const py::gil_scoped_release released;
    const dso_status status = a.is_cuda ? dso_fp8_gemm_nt(&gemm, as_stream(stream)) : dso_fp8_gemm_nt_host(&gemm);
    const py::gil_scoped_acquire acquired;
    require_ok(status);
}

void per_token_cast_to_fp8(const py::object& x_, const py::object& q_, const py::object& sf_, bool use_ue8m0,
                           float amax_floor, uintptr_t stream) {
    const View x = view(x_, "x"), q = view(q_, "q", true), sf = view(sf_, "sf", true);
    require_matrix(x);
    require_type(x, {"f4", "f2", "V2", "u2", "i2"}, "float32, float16, or bfloat16 as 16-bit elements");
    require_type(q, {"u1", "i1", "V1"}, "e4m3 as 8-bit elements");
    require_type(sf, {"f4"}, "float32");
    const int64_t m = x.shape[0], k = x.shape[1];
    require_shape(q, {m, k});
    require_shape(sf, {m, blocks(k)});
    for (const View* array : {&x, &q}) require_contiguous_rows(*array);
    if (m > 1 && q.strides[0] != k) wrong("q", "contiguous");
    require_same_memory(x, {&q, &sf});

    const dso_per_token_cast cast{reinterpret_cast<const void*>(x.data),
                                  reinterpret_cast<void*>(q.data),
                                  reinterpret_cast<float*>(sf.data),
                                  1,
                                  m,
                                  k,
                                  0,
                                  x.strides[0],
                                  0,
                                  sf.strides[0],
                                  sf.strides[1],
                                  x.type == "f4"   ? DSO_F32
                                  : x.type == "f2" ? DSO_F16
                                                   : DSO_BF16,
                                  amax_floor,
                                  use_ue8m0};
    const py::gil_scoped_release released;
    const dso_status status =
        x.is_cuda ? dso_per_token_cast_to_fp8(&cast, as_stream(stream)) : dso_per_token_cast_to_fp8_host(&cast);
    const py::gil_scoped_acquire acquired;
    require_ok(status);
}

py::dict plan_as_dict(const dso_fp8_gemm_plan& plan) {
    using namespace py::literals;
    return py::dict("config"_a = plan.config, "block_m"_a = plan.block_m, "block_n"_a = plan.block_n,
                    "num_k_groups"_a = plan.num_k_groups, "num_stages"_a = plan.num_stages,
                    "swaps_operands"_a = plan.swaps_operands != 0, "shared_bytes"_a = plan.shared_bytes,
                    "most_splits"_a = plan.most_splits, "num_splits"_a = plan.num_splits,
                    "num_shared_tiles"_a = plan.num_shared_tiles);
}

py::dict fp8_gemm_plan(int64_t m, int64_t n, int64_t k, bool batch_invariant, int num_sms) {
    dso_fp8_gemm_plan plan;
    require_ok(dso_plan_fp8_gemm(m, n, k, batch_invariant, num_sms, &plan));
    return plan_as_dict(plan);
}

py::list fp8_gemm_configs() {
    py::list configs;
    for (const dso::Fp8GemmConfig& tile : dso::kFp8GemmConfigs)
        configs.append(
            plan_as_dict({static_cast<int>(configs.size()), tile.max_rows, tile.block_n, tile.num_k_groups,
                          tile.num_stages, tile.swaps_operands, tile.shared_bytes(), tile.most_splits, 1, 0}));
    return configs;
}

}  // namespace

PYBIND11_MODULE(_native, module, py::mod_gil_not_used()) {
    module.doc() = "Build, planners, and kernels on NumPy and CuPy arrays; see _native.pyi.";
    module.def("built_with_cuda", [] { return dso_built_with_cuda() != 0; });
    module.def("has_kernels_for", [](int device) { return dso_has_kernels_for(device) != 0; }, py::arg("device"));
    module.def("fp8_gemm_plan", &fp8_gemm_plan, py::arg("m"), py::arg("n"), py::arg("k"), py::kw_only(),
               py::arg("batch_invariant") = false, py::arg("num_sms") = 132);
    module.def("fp8_gemm_configs", &fp8_gemm_configs);
    module.def("fp8_gemm_nt", &fp8_gemm_nt, py::arg("a"), py::arg("sfa"), py::arg("b"), py::arg("sfb"), py::arg("out"),
               py::kw_only(), py::arg("accumulate") = false, py::arg("stream") = 0);
    module.def("per_token_cast_to_fp8", &per_token_cast_to_fp8, py::arg("x"), py::arg("q"), py::arg("sf"),
               py::kw_only(), py::arg("use_ue8m0") = false, py::arg("amax_floor") = 1e-4f, py::arg("stream") = 0);
}
