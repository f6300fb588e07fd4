// linear_logp's CUDA kernels in the twin module: pointers as integers, no checks.
#include <pybind11/pybind11.h>

#include "cuda/linear_logp.h"

namespace {

template <typename T>
void logp_rows(uintptr_t logits, int64_t n, int64_t vocab, int64_t stride, uintptr_t targets, float inv_temperature, float softcap,
               uintptr_t logp, uintptr_t lse, uintptr_t entropy, uintptr_t correct) {
  fa::cuda::logp_rows(fa::LogpRows<T>{reinterpret_cast<const T*>(logits), n, vocab, stride, reinterpret_cast<const int64_t*>(targets),
                                      inv_temperature, softcap, reinterpret_cast<float*>(logp), reinterpret_cast<float*>(lse),
                                      reinterpret_cast<float*>(entropy), reinterpret_cast<bool*>(correct)},
                      0);
}

template <typename T, typename U>
void grad_rows(uintptr_t logits, int64_t n, int64_t vocab, int64_t stride, uintptr_t out, int64_t out_stride, uintptr_t targets,
               uintptr_t lse, uintptr_t entropy, uintptr_t g_logp, uintptr_t g_entropy, float inv_temperature, float softcap) {
  fa::cuda::grad_rows(fa::GradRows<T, U>{reinterpret_cast<const T*>(logits), n, vocab, stride, reinterpret_cast<U*>(out), out_stride,
                                         reinterpret_cast<const int64_t*>(targets), reinterpret_cast<const float*>(lse),
                                         reinterpret_cast<const float*>(entropy), reinterpret_cast<const float*>(g_logp),
                                         reinterpret_cast<const float*>(g_entropy), inv_temperature, softcap},
                      0);
}

}  // namespace

void bind_linear_logp(pybind11::module_& m) {
  m.def("logp_rows_f32", &logp_rows<float>);
  m.def("logp_rows_bf16", &logp_rows<uint16_t>);
  m.def("grad_rows_f32", &grad_rows<float, float>);
  m.def("grad_rows_bf16", &grad_rows<uint16_t, uint16_t>);
  m.def("grad_rows_f32_bf16", &grad_rows<float, uint16_t>);
}
