// Checks and dispatch of the norm over the last dimension: x [.., width] and all that has its shape contiguous, weight [width].
#include "arguments.h"
#include "cpu/rms_norm.h"

namespace py = pybind11;

namespace fa {
namespace {

template <typename T>
RmsNorm<T> of(const Tensor& x, const Tensor& weight, float eps) {
  if (x.dim() < 1 || x.shape.back() < 1)
    throw std::invalid_argument("rms_norm: x: expected [.., width], got " + Tensor::describe(x.dtype, x.shape));
  const int64_t width = x.shape.back();
  weight.check("rms_norm: weight", x.dtype, {width}).contiguous("rms_norm: weight");
  return {elements<T>("rms_norm: x", x, x), weight.ptr<T>(), x.numel() / width, width, eps};
}

void rms_norm(const Tensor& x, const Tensor& weight, float eps, const Tensor& out) {
  by_element("rms_norm: x", x, [&]<typename T>(T) {
    const RmsNorm<T> args = of<T>(x, weight, eps);
    T* to = elements<T>("rms_norm: out", out, x);
    py::gil_scoped_release release;
    FA_CALL(rms_norm, args, to);
  });
}

// d_weight [width] fp32 and partial [blocks, width] fp32, both empty where the weight's gradient is not asked for.
void rms_norm_backward(const Tensor& x, const Tensor& weight, float eps, const Tensor& grad, const Tensor& d_x, const Tensor& d_weight,
                       const Tensor& partial) {
  by_element("rms_norm: x", x, [&]<typename T>(T) {
    const RmsNorm<T> args = of<T>(x, weight, eps);
    RmsNormGrads<T> to{elements<T>("rms_norm: grad", grad, x), elements<T>("rms_norm: d_x", d_x, x), nullptr, nullptr};
    if (d_weight.numel()) {
      const int64_t blocks = (args.rows + kRmsNormRows - 1) / kRmsNormRows;
      to.weight = typed<float>("rms_norm: d_weight", d_weight, {args.width});
      to.partial = typed<float>("rms_norm: partial", partial, {blocks, args.width});
    }
    py::gil_scoped_release release;
    FA_CALL(rms_norm_backward, args, to);
  });
}

}  // namespace

void bind_rms_norm(py::module_& m) {
  m.attr("rms_norm_rows") = kRmsNormRows;
  m.def("rms_norm", &rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"));
  m.def("rms_norm_backward", &rms_norm_backward, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("grad"), py::arg("d_x"),
        py::arg("d_weight"), py::arg("partial"));
}

}  // namespace fa
