// Checks and dispatch of the scans.
#include <string>

#include "cpu/scan.h"
#include "tensor.h"

namespace py = pybind11;

namespace fa {
namespace {

template <typename T>
constexpr DType dtype_of() {
  return sizeof(T) == 4 ? DType::f32 : DType::f64;
}

template <typename T>
T* typed(const char* what, const Tensor& t, int64_t n) {
  return t.check(what, dtype_of<T>(), {n}).contiguous(what).template ptr<T>();
}

const int32_t* offsets(const Tensor& cu_seqlens, int64_t num_tokens) {
  cu_seqlens.check("cu_seqlens", DType::i32, {-1}).contiguous("cu_seqlens");
  const int32_t* cu = cu_seqlens.ptr<int32_t>();
  const int64_t last = cu_seqlens.size(0) - 1;
  bool ok = last >= 0 && cu[0] == 0 && cu[last] == num_tokens;
  for (int64_t s = 0; ok && s < last; ++s) ok = cu[s] <= cu[s + 1];
  if (!ok) throw std::invalid_argument("cu_seqlens: expected offsets that rise from 0 to " + std::to_string(num_tokens));
  return cu;
}

void gae(const Tensor& rewards, const Tensor& values, const Tensor& cu_seqlens, const Tensor& mask, const Tensor& bootstrap,
         const Tensor& lam, double gamma, const Tensor& advantages, const Tensor& returns) {
  auto run = [&]<typename T>(T) {
    const int64_t n = rewards.numel(), sequences = cu_seqlens.numel() - 1;
    GaeScan<T> scan{typed<T>("gae: rewards", rewards, n),
                    typed<T>("gae: values", values, n),
                    offsets(cu_seqlens, n),
                    sequences,
                    mask.numel() ? mask.check("gae: mask", DType::boolean, {n}).contiguous("gae: mask").ptr<bool>() : nullptr,
                    bootstrap.numel() ? typed<T>("gae: bootstrap", bootstrap, sequences) : nullptr,
                    lam.check("gae: lam", DType::f64, {sequences}).contiguous("gae: lam").ptr<double>(),
                    gamma,
                    typed<T>("gae: advantages", advantages, n),
                    typed<T>("gae: returns", returns, n)};
    py::gil_scoped_release release;
    FA_CALL(gae, scan);
  };
  rewards.dtype == DType::f64 ? run(double{}) : run(float{});
}

void discounted_returns(const Tensor& rewards, const Tensor& cu_seqlens, double gamma, const Tensor& returns) {
  auto run = [&]<typename T>(T) {
    const int64_t n = rewards.numel();
    DiscountedScan<T> scan{typed<T>("discounted_returns: rewards", rewards, n), offsets(cu_seqlens, n), cu_seqlens.numel() - 1, gamma,
                           typed<T>("discounted_returns: returns", returns, n)};
    py::gil_scoped_release release;
    FA_CALL(discounted_returns, scan);
  };
  rewards.dtype == DType::f64 ? run(double{}) : run(float{});
}

}  // namespace

void bind_scan(py::module_& m) {
  m.def("gae", &gae, py::arg("rewards"), py::arg("values"), py::arg("cu_seqlens"), py::arg("mask"), py::arg("bootstrap"), py::arg("lam"),
        py::arg("gamma"), py::arg("advantages"), py::arg("returns"));
  m.def("discounted_returns", &discounted_returns, py::arg("rewards"), py::arg("cu_seqlens"), py::arg("gamma"), py::arg("returns"));
}

}  // namespace fa
