#include <pybind11/pybind11.h>
#include "launch/deepseek_kernels.h"
PYBIND11_MODULE(_native, m, pybind11::mod_gil_not_used()) { m.def("built_with_cuda", [] { return bool(dso_built_with_cuda()); }); }
