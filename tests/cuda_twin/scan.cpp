// The scans' CUDA kernels in the twin module: pointers as integers, no checks.
#include <pybind11/pybind11.h>

#include "cuda/scan.h"

namespace {

template <typename T>
void gae(uintptr_t rewards, uintptr_t values, int64_t num_tokens, uintptr_t cu_seqlens, int64_t num_sequences, uintptr_t mask,
         uintptr_t bootstrap, uintptr_t lams, double lam, double gamma, uintptr_t advantages, uintptr_t returns, uintptr_t workspace) {
  fa::cuda::gae(fa::GaeScan<T>{reinterpret_cast<const T*>(rewards), reinterpret_cast<const T*>(values),
                               reinterpret_cast<const int32_t*>(cu_seqlens), num_sequences, reinterpret_cast<const bool*>(mask),
                               reinterpret_cast<const T*>(bootstrap), reinterpret_cast<const double*>(lams), lam, gamma,
                               reinterpret_cast<T*>(advantages), reinterpret_cast<T*>(returns)},
                num_tokens, reinterpret_cast<double*>(workspace), 0);
}

template <typename T>
void discounted_returns(uintptr_t rewards, int64_t num_tokens, uintptr_t cu_seqlens, int64_t num_sequences, double gamma, uintptr_t returns,
                        uintptr_t workspace) {
  fa::cuda::discounted_returns(fa::DiscountedScan<T>{reinterpret_cast<const T*>(rewards), reinterpret_cast<const int32_t*>(cu_seqlens),
                                                     num_sequences, gamma, reinterpret_cast<T*>(returns)},
                               num_tokens, reinterpret_cast<double*>(workspace), 0);
}

}  // namespace

void bind_scan(pybind11::module_& m) {
  m.def("gae_f32", &gae<float>);
  m.def("gae_f64", &gae<double>);
  m.def("discounted_returns_f32", &discounted_returns<float>);
  m.def("discounted_returns_f64", &discounted_returns<double>);
  m.def("scan_workspace", &fa::cuda::scan_workspace);
}
