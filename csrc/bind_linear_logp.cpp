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

void check_logits(const char* what, const Tensor& logits, const Tensor& targets) {
  if ((logits.dtype != DType::f32 && logits.dtype != DType::bf16) || logits.dim() != 2)
    throw std::invalid_argument(std::string(what) + ": logits: expected float32 or bfloat16 [N, V], got " +
                                Tensor::describe(logits.dtype, logits.shape));
  if (logits.size(1) > 1 && logits.stride(1) != 1)
    throw std::invalid_argument(std::string(what) + ": logits: expected contiguous rows, got a stride of " + std::to_string(logits.stride(1)));
  targets.check((std::string(what) + ": targets").c_str(), DType::i64, {logits.size(0)}).contiguous("targets");
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

template <typename T>
GradRows<T> grad_arguments(const Tensor& logits, const Tensor& targets, const Tensor& lse, const Tensor& entropy, const Tensor& g_logp,
                           const Tensor& g_entropy, float inv_temperature, float softcap) {
  const int64_t n = logits.size(0);
  const bool with_entropy = n && g_entropy.numel();
  return {logits.ptr<T>(),
          n,
          logits.size(1),
          logits.stride(0),
          targets.ptr<int64_t>(),
          floats("grad_rows: lse", lse, n),
          with_entropy ? floats("grad_rows: entropy", entropy, n) : nullptr,
          floats("grad_rows: g_logp", g_logp, n),
          with_entropy ? floats("grad_rows: g_entropy", g_entropy, n) : nullptr,
          inv_temperature,
          softcap};
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
               const Tensor& g_entropy, float inv_temperature, float softcap) {
  check_logits("grad_rows", logits, targets);
  check_targets("grad_rows", targets, logits.size(1));
  auto run = [&]<typename T>(T) {
    auto rows = grad_arguments<T>(logits, targets, lse, entropy, g_logp, g_entropy, inv_temperature, softcap);
    py::gil_scoped_release release;
    FA_CALL(grad_rows, rows);
  };
  logits.dtype == DType::f32 ? run(float{}) : run(uint16_t{});
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
                    const Tensor& g_entropy, float inv_temperature, float softcap, uintptr_t stream) {
  check_logits("grad_rows", logits, targets);
  auto run = [&]<typename T>(T) {
    cuda::grad_rows(grad_arguments<T>(logits, targets, lse, entropy, g_logp, g_entropy, inv_temperature, softcap), stream);
  };
  logits.dtype == DType::f32 ? run(float{}) : run(uint16_t{});
}
#endif

}  // namespace

void bind_linear_logp(py::module_& m) {
  m.def("logp_rows", &logp_rows, py::arg("logits"), py::arg("targets"), py::arg("inv_temperature"), py::arg("softcap"), py::arg("logp"),
        py::arg("lse"), py::arg("entropy"), py::arg("correct"));
  m.def("grad_rows", &grad_rows, py::arg("logits"), py::arg("targets"), py::arg("lse"), py::arg("entropy"), py::arg("g_logp"),
        py::arg("g_entropy"), py::arg("inv_temperature"), py::arg("softcap"));
#ifdef HAS_CUDA_linear_logp
  m.def("logp_rows_cuda", &logp_rows_cuda);
  m.def("grad_rows_cuda", &grad_rows_cuda);
#endif
}

}  // namespace fa
