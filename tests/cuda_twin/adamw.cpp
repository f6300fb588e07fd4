// AdamW's CUDA kernel in the twin module: pointers as integers, no checks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "cuda/adamw.h"

namespace {

template <typename Grad>
void adamw_step(uintptr_t param, uintptr_t weight, uintptr_t tail, uintptr_t grad, uintptr_t exp_avg, uintptr_t exp_avg_sq, int64_t size,
                uintptr_t grad_scale, const std::vector<float>& o) {
  fa::cuda::adamw_step(
      fa::AdamWStep<Grad>{reinterpret_cast<float*>(param), reinterpret_cast<uint16_t*>(weight), reinterpret_cast<int16_t*>(tail),
                          reinterpret_cast<const Grad*>(grad), reinterpret_cast<float*>(exp_avg), reinterpret_cast<float*>(exp_avg_sq),
                          size, reinterpret_cast<const float*>(grad_scale),
                          {o.at(0), o.at(1), o.at(2), o.at(3), o.at(4), o.at(5), o.at(6)}},
      0);
}

}  // namespace

void bind_adamw(pybind11::module_& m) {
  m.def("adamw_step_f32", &adamw_step<float>);
  m.def("adamw_step_bf16", &adamw_step<uint16_t>);
}
