// Checks and dispatch of the optimizer step. Tensors of any shape, contiguous, all of the parameter's shape.
#include <pybind11/stl.h>

#include "cpu/adamw.h"
#include "tensor.h"
#ifdef HAS_CUDA_adamw
#include "cuda/adamw.h"
#endif

namespace py = pybind11;

namespace fa {
namespace {

// Checks everything and calls `run` with the arguments for the gradient's type. scale: one number, or none in an empty tensor.
template <typename Run>
void with_step(const Tensor& param, const Tensor& tail, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
               const Tensor& scale, const std::vector<float>& o, const Run& run) {
  const bool split = param.dtype == DType::bf16;
  param.check("adamw: param", split ? DType::bf16 : DType::f32, param.shape).contiguous("adamw: param");
  if (split) tail.check("adamw: tail", DType::i16, param.shape).contiguous("adamw: tail");
  exp_avg.check("adamw: exp_avg", DType::f32, param.shape).contiguous("adamw: exp_avg");
  exp_avg_sq.check("adamw: exp_avg_sq", DType::f32, param.shape).contiguous("adamw: exp_avg_sq");
  grad.check("adamw: grad", grad.dtype == DType::bf16 ? DType::bf16 : DType::f32, param.shape).contiguous("adamw: grad");
  if (scale.numel()) scale.check("adamw: grad_scale", DType::f32, std::vector<int64_t>(scale.shape.size(), 1));
  const math::AdamW options{o.at(0), o.at(1), o.at(2), o.at(3), o.at(4), o.at(5), o.at(6)};
  auto arguments = [&]<typename Grad>(Grad) {
    run(AdamWStep<Grad>{split ? nullptr : param.ptr<float>(), split ? param.ptr<uint16_t>() : nullptr,
                        split ? tail.ptr<int16_t>() : nullptr, grad.ptr<Grad>(), exp_avg.ptr<float>(), exp_avg_sq.ptr<float>(),
                        param.numel(), scale.numel() ? scale.ptr<float>() : nullptr, options});
  };
  grad.dtype == DType::bf16 ? arguments(uint16_t{}) : arguments(float{});
}

void adamw_step(const Tensor& param, const Tensor& tail, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                const Tensor& scale, const std::vector<float>& options) {
  with_step(param, tail, grad, exp_avg, exp_avg_sq, scale, options, [](const auto& step) {
    py::gil_scoped_release release;
    FA_CALL(adamw_step, step);
  });
}

#ifdef HAS_CUDA_adamw
void adamw_step_cuda(const Tensor& param, const Tensor& tail, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                     const Tensor& scale, const std::vector<float>& options, uintptr_t stream) {
  with_step(param, tail, grad, exp_avg, exp_avg_sq, scale, options, [&](const auto& step) { cuda::adamw_step(step, stream); });
}
#endif

}  // namespace

void bind_adamw(py::module_& m) {
  m.def("adamw_step", &adamw_step, py::arg("param"), py::arg("tail"), py::arg("grad"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
        py::arg("grad_scale"), py::arg("options"));
#ifdef HAS_CUDA_adamw
  m.def("adamw_step_cuda", &adamw_step_cuda);
#endif
}

}  // namespace fa
