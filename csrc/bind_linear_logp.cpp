// Checks and dispatch of the row kernels: by dtype, by device.
#include <stdexcept>
#include <string>

#include "cpu/linear_logp.h"
#include "tensor.h"
#ifdef HAS_CUDA_linear_logp
#include "cuda/linear_logp.h"
#endif

namespace py = pybind11;

namespace fa {
namespace {

void check_rows(const std::string& what, const Tensor& t) {
  if ((t.dtype != DType::f32 && t.dtype != DType::bf16) || t.dim() != 2)
    throw std::invalid_argument(what + ": expected float32 or bfloat16 [N, V], got " + Tensor::describe(t.dtype, t.shape));
  if (t.size(1) > 1 && t.stride(1) != 1)
    throw std::invalid_argument(what + ": expected contiguous rows, got a stride of " + std::to_string(t.stride(1)));
}

void check_logits(const char* what, const Tensor& logits, const Tensor& targets) {
  check_rows(std::string(what) + ": logits", logits);
  targets.check((std::string(what) + ": targets").c_str(), DType::i64, {logits.size(0)}).contiguous("targets");
  if (targets.cuda != logits.cuda)  // a kernel would read an address of the other memory
    throw std::invalid_argument(std::string(what) + ": targets: expected a tensor on the " + (logits.cuda ? "GPU" : "CPU") +
                                ", where the logits are");
}

// On the CPU targets are read here, and one outside the vocabulary is named; on a GPU that would cost a synchronization.
void check_targets(const char* what, const Tensor& targets, int64_t vocab) {
  const int64_t* target = targets.ptr<int64_t>();
  for (int64_t i = 0; i < targets.size(0); ++i)
    if (target[i] < 0 || target[i] >= vocab)
      throw std::invalid_argument(std::string(what) + ": targets must be in [0, vocab size " + std::to_string(vocab) + "), got " +
                                  std::to_string(target[i]) + " at row " + std::to_string(i) + "; is the tokenizer larger than the head?");
}

float* floats(const char* what, const Tensor& t, int64_t n) { return t.check(what, DType::f32, {n}).contiguous(what).ptr<float>(); }

template <typename T>
LogpRows<T> logp_arguments(const Tensor& logits, const Tensor& targets, float inv_temperature, float softcap, const Tensor& logp,
                           const Tensor& lse, const Tensor& entropy, const Tensor& correct) {
  const int64_t n = logits.size(0);
  return {logits.ptr<T>(),
          n,
          logits.size(1),
          logits.stride(0),
          targets.ptr<int64_t>(),
          inv_temperature,
          softcap,
          floats("logp_rows: logp", logp, n),
          floats("logp_rows: lse", lse, n),
          entropy.numel() || !n ? floats("logp_rows: entropy", entropy, n) : nullptr,
          correct.check("logp_rows: correct", DType::boolean, {n}).contiguous("correct").ptr<bool>()};
}

template <typename T, typename U>
GradRows<T, U> grad_arguments(const Tensor& logits, const Tensor& out, const Tensor& targets, const Tensor& lse, const Tensor& entropy,
                              const Tensor& g_logp, const Tensor& g_entropy, float inv_temperature, float softcap) {
  const int64_t n = logits.size(0);
  const bool with_entropy = n && g_entropy.numel();
  return {logits.ptr<T>(),
          n,
          logits.size(1),
          logits.stride(0),
          out.ptr<U>(),
          out.stride(0),
          targets.ptr<int64_t>(),
          floats("grad_rows: lse", lse, n),
          with_entropy ? floats("grad_rows: entropy", entropy, n) : nullptr,
          floats("grad_rows: g_logp", g_logp, n),
          with_entropy ? floats("grad_rows: g_entropy", g_entropy, n) : nullptr,
          inv_temperature,
          softcap};
}

// run(logit, gradient) of the element types: fp32 → fp32 or bf16, bf16 → bf16.
template <typename Run>
void by_types(const Tensor& logits, const Tensor& out, Run run) {
  check_rows("grad_rows: out", out);
  out.check("grad_rows: out", logits.dtype == DType::bf16 ? DType::bf16 : out.dtype, {logits.size(0), logits.size(1)});
  if (logits.dtype == DType::bf16)
    run(uint16_t{}, uint16_t{});
  else if (out.dtype == DType::bf16)
    run(float{}, uint16_t{});
  else
    run(float{}, float{});
}

void logp_rows(const Tensor& logits, const Tensor& targets, float inv_temperature, float softcap, const Tensor& logp, const Tensor& lse,
               const Tensor& entropy, const Tensor& correct) {
  check_logits("logp_rows", logits, targets);
  check_targets("logp_rows", targets, logits.size(1));
  auto run = [&]<typename T>(T) {
    auto rows = logp_arguments<T>(logits, targets, inv_temperature, softcap, logp, lse, entropy, correct);
    py::gil_scoped_release release;
    FA_CALL(logp_rows, rows);
  };
  logits.dtype == DType::f32 ? run(float{}) : run(uint16_t{});
}

void grad_rows(const Tensor& logits, const Tensor& targets, const Tensor& lse, const Tensor& entropy, const Tensor& g_logp,
               const Tensor& g_entropy, float inv_temperature, float softcap, const Tensor& out) {
  check_logits("grad_rows", logits, targets);
  check_targets("grad_rows", targets, logits.size(1));
  by_types(logits, out, [&]<typename T, typename U>(T, U) {
    auto rows = grad_arguments<T, U>(logits, out, targets, lse, entropy, g_logp, g_entropy, inv_temperature, softcap);
    py::gil_scoped_release release;
    FA_CALL(grad_rows, rows);
  });
}

void check_product(const char* what, const Tensor& a, const Tensor& b, const Tensor& out) {
  a.check(what, DType::bf16, {-1, -1});
  b.check(what, DType::bf16, {-1, -1});
  out.check(what, DType::f32, {-1, -1});
  for (const Tensor* t : {&a, &b, &out}) check_rows(what, *t);
}

void bf16_product_rows(const Tensor& a, const Tensor& b, const Tensor& bias, const Tensor& out) {
  constexpr const char* what = "bf16_product_rows";
  check_product(what, a, b, out);
  const int64_t m = a.size(0), n = b.size(0), k = b.size(1);
  a.check(what, DType::bf16, {m, k + k % 2});  // the tile reads pairs
  out.check(what, DType::f32, {m, n});
  const float* start = bias.numel() || !n ? floats("bf16_product_rows: bias", bias, n) : nullptr;
  const Bf16Product product{a.ptr<uint16_t>(), b.ptr<uint16_t>(), out.ptr<float>(), start, m, n, k,
                            a.stride(0), b.stride(0), out.stride(0), 1.0f, false, has_bf16_dot()};
  py::gil_scoped_release release;
  FA_CALL(product_rows, product);
}

void bf16_product_columns(const Tensor& a, const Tensor& b, const Tensor& out, float alpha, bool add) {
  constexpr const char* what = "bf16_product_columns";
  check_product(what, a, b, out);
  const int64_t k = a.size(0), m = a.size(1), n = b.size(1);
  b.check(what, DType::bf16, {k, n});
  out.check(what, DType::f32, {m, n});
  const Bf16Product product{a.ptr<uint16_t>(), b.ptr<uint16_t>(), out.ptr<float>(), nullptr, m, n, k,
                            a.stride(0), b.stride(0), out.stride(0), alpha, add, has_bf16_dot()};
  py::gil_scoped_release release;
  FA_CALL(product_columns, product);
}

#ifdef HAS_CUDA_linear_logp
void logp_rows_cuda(const Tensor& logits, const Tensor& targets, float inv_temperature, float softcap, const Tensor& logp,
                    const Tensor& lse, const Tensor& entropy, const Tensor& correct, uintptr_t stream) {
  check_logits("logp_rows", logits, targets);
  auto run = [&]<typename T>(T) {
    cuda::logp_rows(logp_arguments<T>(logits, targets, inv_temperature, softcap, logp, lse, entropy, correct), stream);
  };
  logits.dtype == DType::f32 ? run(float{}) : run(uint16_t{});
}

void grad_rows_cuda(const Tensor& logits, const Tensor& targets, const Tensor& lse, const Tensor& entropy, const Tensor& g_logp,
                    const Tensor& g_entropy, float inv_temperature, float softcap, const Tensor& out, uintptr_t stream) {
  check_logits("grad_rows", logits, targets);
  by_types(logits, out, [&]<typename T, typename U>(T, U) {
    cuda::grad_rows(grad_arguments<T, U>(logits, out, targets, lse, entropy, g_logp, g_entropy, inv_temperature, softcap), stream);
  });
}
#endif

}  // namespace

void bind_linear_logp(py::module_& m) {
  m.def("logp_rows", &logp_rows, py::arg("logits"), py::arg("targets"), py::arg("inv_temperature"), py::arg("softcap"), py::arg("logp"),
        py::arg("lse"), py::arg("entropy"), py::arg("correct"));
  m.def("grad_rows", &grad_rows, py::arg("logits"), py::arg("targets"), py::arg("lse"), py::arg("entropy"), py::arg("g_logp"),
        py::arg("g_entropy"), py::arg("inv_temperature"), py::arg("softcap"), py::arg("out"));
  m.def("bf16_product_rows", &bf16_product_rows, py::arg("a"), py::arg("b"), py::arg("bias"), py::arg("out"));
  m.def("bf16_product_columns", &bf16_product_columns, py::arg("a"), py::arg("b"), py::arg("out"), py::arg("alpha"), py::arg("add"));
  m.def("has_bf16_dot", &has_bf16_dot, "Whether bf16 products run on vdpbf16ps: at the speed of a bf16 GEMM, not of an fp32 one.");
#ifdef HAS_CUDA_linear_logp
  m.def("logp_rows_cuda", &logp_rows_cuda);
  m.def("grad_rows_cuda", &grad_rows_cuda);
#endif
}

}  // namespace fa
