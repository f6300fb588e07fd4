// Checks and dispatch of the sampler, and its counter-based uniforms.
#include <stdexcept>
#include <string>

#include "cpu/sample.h"
#include "math/philox.h"
#include "tensor.h"

namespace py = pybind11;

namespace fa {
namespace {

template <typename T>
T* column(const char* what, const Tensor& t, DType type, int64_t n) {
  return t.check(what, type, {n}).contiguous(what).ptr<T>();
}

void sample(const Tensor& logits, const Tensor& uniforms, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
            const Tensor& min_p, float softcap, const Tensor& tokens, const Tensor& kept) {
  if ((logits.dtype != DType::f32 && logits.dtype != DType::bf16) || logits.dim() != 2 || logits.size(1) < 1)
    throw std::invalid_argument("sample: logits: expected float32 or bfloat16 [N, V], got " + Tensor::describe(logits.dtype, logits.shape));
  if (logits.size(1) > 1 && logits.stride(1) != 1)
    throw std::invalid_argument("sample: logits: expected contiguous rows, got a stride of " + std::to_string(logits.stride(1)));
  const int64_t n = logits.size(0);
  auto run = [&]<typename T>(T) {
    SampleRows<T> rows{logits.ptr<T>(),
                       n,
                       logits.size(1),
                       logits.stride(0),
                       column<double>("sample: uniforms", uniforms, DType::f64, n),
                       column<float>("sample: temperature", temperature, DType::f32, n),
                       column<int64_t>("sample: top_k", top_k, DType::i64, n),
                       column<float>("sample: top_p", top_p, DType::f32, n),
                       column<float>("sample: min_p", min_p, DType::f32, n),
                       softcap,
                       column<int64_t>("sample: tokens", tokens, DType::i64, n),
                       column<float>("sample: kept", kept, DType::f32, n)};
    py::gil_scoped_release release;
    FA_CALL(sample, rows);
  };
  logits.dtype == DType::f32 ? run(float{}) : run(uint16_t{});
}

void philox_uniform(const Tensor& seed, const Tensor& request, const Tensor& sample, const Tensor& position, const Tensor& out) {
  const int64_t n = out.numel();
  const int64_t* key = column<int64_t>("uniform: seed", seed, DType::i64, n);
  const int64_t* high = column<int64_t>("uniform: request", request, DType::i64, n);
  const int64_t* which = column<int64_t>("uniform: sample", sample, DType::i64, n);
  const int64_t* at = column<int64_t>("uniform: position", position, DType::i64, n);
  double* u = column<double>("uniform: out", out, DType::f64, n);
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t low = (static_cast<uint64_t>(which[i]) << 32) | (static_cast<uint64_t>(at[i]) & 0xFFFFFFFFu);
    const math::Philox words = math::philox(static_cast<uint64_t>(key[i]), low, static_cast<uint64_t>(high[i]));
    u[i] = math::uniform53(words.word[0], words.word[1]);
  }
}

}  // namespace

void bind_sample(py::module_& m) {
  m.def("sample", &sample, py::arg("logits"), py::arg("uniforms"), py::arg("temperature"), py::arg("top_k"), py::arg("top_p"),
        py::arg("min_p"), py::arg("softcap"), py::arg("tokens"), py::arg("kept"));
  m.def("philox_uniform", &philox_uniform, py::arg("seed"), py::arg("request"), py::arg("sample"), py::arg("position"), py::arg("out"));
}

}  // namespace fa
