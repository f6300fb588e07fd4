// Checks and dispatch of the policy op. An empty tensor stands for what is not given.
#include <pybind11/stl.h>

#include <string>

#include "arguments.h"
#include "cpu/policy.h"

namespace py = pybind11;

namespace fa {
namespace {

template <typename T>
const T* optional_tokens(const char* what, const Tensor& t, int64_t n) {
  return t.numel() ? typed<T>(what, t, {n}) : nullptr;
}

// codes: loss, advantage, kl, correction (the enums of math/policy.h); numbers: the Reals of math::Policy, in their order.
template <typename T>
math::Policy<T> options_of(const std::vector<int64_t>& codes, const std::vector<double>& numbers) {
  constexpr int64_t limits[] = {7, 3, 4, 5};
  bool ok = codes.size() == 4 && numbers.size() == 10;
  for (size_t i = 0; ok && i < 4; ++i) ok = codes[i] >= 0 && codes[i] < limits[i];
  if (!ok) throw std::invalid_argument("policy: expected 4 codes of known rows and 10 numbers");
  math::Policy<T> p{};
  p.loss = static_cast<math::PolicyLoss>(codes[0]);
  p.advantage = static_cast<math::Advantage>(codes[1]);
  p.kl = static_cast<math::KlEstimator>(codes[2]);
  p.correction = static_cast<math::Correction>(codes[3]);
  T* const reals[] = {&p.low,         &p.high,    &p.dual_clip,    &p.tau_positive,   &p.tau_negative,
                      &p.log_epsilon, &p.kl_coef, &p.entropy_coef, &p.correction_low, &p.correction_high};
  for (size_t i = 0; i < 10; ++i) *reals[i] = static_cast<T>(numbers[i]);
  return p;
}

void policy(const Tensor& logp, const Tensor& old_logp, const Tensor& advantages, const Tensor& weights, const Tensor& ref_logp,
            const Tensor& sampler_logp, const Tensor& entropy, const Tensor& cu_targets, const std::vector<int64_t>& codes,
            const std::vector<double>& numbers, const Tensor& grad, const Tensor& sums) {
  by_dtype(logp, [&]<typename T>(T) {
    const int64_t n = logp.numel();
    PolicyTokens<T> tokens{n,
                           typed<T>("policy: logp", logp, {n}),
                           typed<T>("policy: old_logp", old_logp, {n}),
                           typed<T>("policy: advantages", advantages, {n}),
                           typed<T>("policy: weights", weights, {n}),
                           optional_tokens<T>("policy: ref_logp", ref_logp, n),
                           optional_tokens<T>("policy: sampler_logp", sampler_logp, n),
                           optional_tokens<T>("policy: entropy", entropy, n),
                           nullptr,
                           0,
                           options_of<T>(codes, numbers),
                           typed<T>("policy: grad", grad, {n}),
                           sums.check("policy: sums", DType::f64, {kNumPolicySums}).contiguous("policy: sums").ptr<double>()};
    if (tokens.ref_logp && tokens.options.kl == math::KlEstimator::none)
      throw std::invalid_argument("policy: ref_logp was given without a KL estimator");
    if (tokens.options.has_sequence_ratio() || (tokens.sampler_logp && tokens.options.has_sequence_correction())) {
      tokens.cu_targets = offsets("policy: cu_targets", cu_targets, n);
      tokens.num_sequences = cu_targets.numel() - 1;
    }
    py::gil_scoped_release release;
    FA_CALL(policy, tokens);
  });
}

}  // namespace

void bind_policy(py::module_& m) {
  m.def("policy", &policy, py::arg("logp"), py::arg("old_logp"), py::arg("advantages"), py::arg("weights"), py::arg("ref_logp"),
        py::arg("sampler_logp"), py::arg("entropy"), py::arg("cu_targets"), py::arg("codes"), py::arg("numbers"), py::arg("grad"),
        py::arg("sums"));
}

}  // namespace fa
