// Checks and dispatch of silu(gate) * up. Tensors of any shape, contiguous, all of the gate's shape and dtype.
#include "arguments.h"
#include "cpu/swiglu.h"

namespace py = pybind11;

namespace fa {
namespace {

template <typename T>
Swiglu<T> of(const Tensor& gate, const Tensor& up) {
  return {elements<T>("swiglu: gate", gate, gate), elements<T>("swiglu: up", up, gate), gate.numel()};
}

void swiglu(const Tensor& gate, const Tensor& up, const Tensor& out) {
  by_element("swiglu: gate", gate, [&]<typename T>(T) {
    const Swiglu<T> args = of<T>(gate, up);
    T* to = elements<T>("swiglu: out", out, gate);
    py::gil_scoped_release release;
    FA_CALL(swiglu, args, to);
  });
}

void swiglu_backward(const Tensor& gate, const Tensor& up, const Tensor& grad, const Tensor& d_gate, const Tensor& d_up) {
  by_element("swiglu: gate", gate, [&]<typename T>(T) {
    const Swiglu<T> args = of<T>(gate, up);
    const SwigluGrads<T> to{elements<T>("swiglu: grad", grad, gate), elements<T>("swiglu: d_gate", d_gate, gate),
                            elements<T>("swiglu: d_up", d_up, gate)};
    py::gil_scoped_release release;
    FA_CALL(swiglu_backward, args, to);
  });
}

}  // namespace

void bind_swiglu(py::module_& m) {
  m.def("swiglu", &swiglu, py::arg("gate"), py::arg("up"), py::arg("out"));
  m.def("swiglu_backward", &swiglu_backward, py::arg("gate"), py::arg("up"), py::arg("grad"), py::arg("d_gate"), py::arg("d_up"));
}

}  // namespace fa
