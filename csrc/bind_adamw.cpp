// Checks and dispatch of the optimizer step. Tensors of any shape, contiguous, all of the parameter's shape.
#include <pybind11/stl.h>

#include "cpu/adamw.h"
#include "tensor.h"

namespace py = pybind11;

namespace fa {
namespace {

void adamw_step(const Tensor& param, const Tensor& tail, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                const std::vector<float>& o) {
  const bool split = param.dtype == DType::bf16;
  param.check("adamw: param", split ? DType::bf16 : DType::f32, param.shape).contiguous("adamw: param");
  if (split) tail.check("adamw: tail", DType::i16, param.shape).contiguous("adamw: tail");
  exp_avg.check("adamw: exp_avg", DType::f32, param.shape).contiguous("adamw: exp_avg");
  exp_avg_sq.check("adamw: exp_avg_sq", DType::f32, param.shape).contiguous("adamw: exp_avg_sq");
  grad.check("adamw: grad", grad.dtype == DType::bf16 ? DType::bf16 : DType::f32, param.shape).contiguous("adamw: grad");
  const math::AdamW options{o.at(0), o.at(1), o.at(2), o.at(3), o.at(4), o.at(5), o.at(6), o.at(7)};
  auto run = [&]<typename Grad>(Grad) {
    AdamWStep<Grad> step{split ? nullptr : param.ptr<float>(),
                         split ? param.ptr<uint16_t>() : nullptr,
                         split ? tail.ptr<int16_t>() : nullptr,
                         grad.ptr<Grad>(),
                         exp_avg.ptr<float>(),
                         exp_avg_sq.ptr<float>(),
                         param.numel(),
                         options};
    py::gil_scoped_release release;
    FA_CALL(adamw_step, step);
  };
  grad.dtype == DType::bf16 ? run(uint16_t{}) : run(float{});
}

}  // namespace

void bind_adamw(py::module_& m) {
  m.def("adamw_step", &adamw_step, py::arg("param"), py::arg("tail"), py::arg("grad"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
        py::arg("options"));
}

}  // namespace fa
