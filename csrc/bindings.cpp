// The one PYBIND11_MODULE. Each op binds itself in csrc/bind_<op>.cpp's function; every call releases the GIL while it computes.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace fa {
void bind_linear_logp(py::module_& m);
void bind_scan(py::module_& m);
void bind_adamw(py::module_& m);
void bind_attention(py::module_& m);
void bind_sample(py::module_& m);
}  // namespace fa

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastalign's native kernels; torch-free. Import torch first: OpenMP comes from the runtime that torch has loaded.";
}
