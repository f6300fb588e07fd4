// Checks and dispatch of the scans. An empty mask, bootstrap or lams tensor stands for none.
#include <string>

#include "arguments.h"
#include "cpu/scan.h"
#ifdef HAS_CUDA_scan
#include "cuda/scan.h"
#endif

namespace py = pybind11;

namespace fa {
namespace {

template <typename T>
GaeScan<T> gae_arguments(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, const Tensor& mask, const Tensor& bootstrap,
                         const Tensor& lams, double lam, double gamma, const Tensor& advantages, const Tensor& returns) {
  const int64_t n = rewards.numel(), sequences = cu_seqlens.numel() - 1;
  return {typed<T>("gae: rewards", rewards, {n}),
          typed<T>("gae: values", values, {n}),
          offsets("gae: cu_seqlens", cu_seqlens, n),
          sequences,
          mask.numel() ? mask.check("gae: mask", DType::boolean, {n}).contiguous("gae: mask").ptr<bool>() : nullptr,
          bootstrap.numel() ? typed<T>("gae: bootstrap", bootstrap, {sequences}) : nullptr,
          lams.numel() ? lams.check("gae: lam", DType::f64, {sequences}).contiguous("gae: lam").ptr<double>() : nullptr,
          lam,
          gamma,
          typed<T>("gae: advantages", advantages, {n}),
          typed<T>("gae: returns", returns, {n})};
}

template <typename T>
DiscountedScan<T> discounted_arguments(const Tensor& rewards, const Tensor& cu_seqlens, double gamma, const Tensor& returns) {
  const int64_t n = rewards.numel();
  return {typed<T>("discounted_returns: rewards", rewards, {n}), offsets("discounted_returns: cu_seqlens", cu_seqlens, n),
          cu_seqlens.numel() - 1, gamma,
          typed<T>("discounted_returns: returns", returns, {n})};
}

void gae(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, const Tensor& mask, const Tensor& bootstrap,
         const Tensor& lams, double lam, double gamma, const Tensor& advantages, const Tensor& returns) {
  by_dtype(rewards, [&]<typename T>(T) {
    const auto scan = gae_arguments<T>(rewards, values, cu_seqlens, mask, bootstrap, lams, lam, gamma, advantages, returns);
    py::gil_scoped_release release;
    FA_CALL(gae, scan);
  });
}

void discounted_returns(const Tensor& rewards, const Tensor& cu_seqlens, double gamma, const Tensor& returns) {
  by_dtype(rewards, [&]<typename T>(T) {
    const auto scan = discounted_arguments<T>(rewards, cu_seqlens, gamma, returns);
    py::gil_scoped_release release;
    FA_CALL(discounted_returns, scan);
  });
}

#ifdef HAS_CUDA_scan
double* checked_workspace(const Tensor& workspace, int64_t num_tokens) {
  return workspace.check("scan: workspace", DType::f64, {cuda::scan_workspace(num_tokens)}).ptr<double>();
}

void gae_cuda(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, const Tensor& mask, const Tensor& bootstrap,
              const Tensor& lams, double lam, double gamma, const Tensor& advantages, const Tensor& returns, const Tensor& workspace,
              uintptr_t stream) {
  by_dtype(rewards, [&]<typename T>(T) {
    const auto scan = gae_arguments<T>(rewards, values, cu_seqlens, mask, bootstrap, lams, lam, gamma, advantages, returns);
    cuda::gae(scan, rewards.numel(), checked_workspace(workspace, rewards.numel()), stream);
  });
}

void discounted_returns_cuda(const Tensor& rewards, const Tensor& cu_seqlens, double gamma, const Tensor& returns, const Tensor& workspace,
                             uintptr_t stream) {
  by_dtype(rewards, [&]<typename T>(T) {
    const auto scan = discounted_arguments<T>(rewards, cu_seqlens, gamma, returns);
    cuda::discounted_returns(scan, rewards.numel(), checked_workspace(workspace, rewards.numel()), stream);
  });
}
#endif

}  // namespace

void bind_scan(py::module_& m) {
  m.def("gae", &gae, py::arg("rewards"), py::arg("values"), py::arg("cu_seqlens"), py::arg("mask"), py::arg("bootstrap"), py::arg("lams"),
        py::arg("lam"), py::arg("gamma"), py::arg("advantages"), py::arg("returns"));
  m.def("discounted_returns", &discounted_returns, py::arg("rewards"), py::arg("cu_seqlens"), py::arg("gamma"), py::arg("returns"));
#ifdef HAS_CUDA_scan
  m.def("gae_cuda", &gae_cuda);
  m.def("discounted_returns_cuda", &discounted_returns_cuda);
  m.def("scan_workspace", &cuda::scan_workspace, py::arg("num_tokens"), "How many doubles of device memory a scan needs.");
#endif
}

}  // namespace fa
