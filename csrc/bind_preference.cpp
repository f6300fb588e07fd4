// Checks and dispatch of the preference losses: by dtype, by device.
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>

#include "arguments.h"
#include "cpu/preference.h"
#ifdef HAS_CUDA_preference
#include "cuda/preference.h"
#endif

namespace py = pybind11;

namespace fa {
namespace {

constexpr const char* kPairs[] = {"logistic", "square", "hinge", "exo", "nca", "bco", "sppo", "apo_zero", "apo_down", "discopop", "orpo", "none"};
constexpr const char* kSingles[] = {"kto", "bco"};

template <typename E, size_t N>
E named(const char* const (&names)[N], const std::string& name) {
  std::string all;
  for (size_t i = 0; i < N; ++i) {
    if (name == names[i]) return static_cast<E>(i);
    all += (i ? ", " : "") + std::string(names[i]);
  }
  throw std::invalid_argument("preference: expected a formula out of " + all + "; got '" + name + "'");
}

using Maybe = std::optional<Tensor>;

// Whether the kernels on the CPU take the arguments as they are: 0, no or not known (something is to be checked, converted or refused with a
// better word); 1, the reference is absent or sums; 2, it is a token's. One call for what takes 30 us to ask of the tensors one by one.
int fits(const py::object& logp, const py::object& cu_targets, const py::object& ref_logp, const py::object& margin,
         const py::object& weight, int64_t unit) {
  py::detail::make_caster<Tensor> log_probs, cu, other;
  const auto flat = [&](const py::object& object, py::detail::make_caster<Tensor>& t, auto&& good) {
    if (!t.load(object, false)) return false;
    const Tensor& it = t;
    return !it.cuda && it.dim() == 1 && (it.size(0) < 2 || it.stride(0) == 1) && good(it);
  };
  const auto real = [](const Tensor& t) { return t.dtype == DType::f32 || t.dtype == DType::f64; };
  const auto risen = [&](const Tensor& t) { return t.dtype == DType::i32 && t.size(0) > 0 && (t.size(0) - 1) % unit == 0; };
  if (!flat(logp, log_probs, real) || !flat(cu_targets, cu, risen)) return 0;
  const Tensor& like = log_probs;
  const int64_t tokens = like.size(0), sequences = static_cast<const Tensor&>(cu).size(0) - 1;
  for (const py::object* given : {&margin, &weight})
    if (!given->is_none() && !flat(*given, other, [&](const Tensor& t) { return t.dtype == like.dtype && t.size(0) == sequences / unit; }))
      return 0;
  if (ref_logp.is_none()) return 1;
  if (!flat(ref_logp, other, [&](const Tensor& t) { return t.dtype == like.dtype; }) || tokens == sequences) return 0;
  const int64_t size = static_cast<const Tensor&>(other).size(0);
  return size == tokens ? 2 : size == sequences ? 1 : 0;
}

// A kernel would read an address of the other memory.
void beside(const Tensor& logp, const char* what, const Maybe& t) {
  if (t && t->cuda != logp.cuda)
    throw std::invalid_argument(std::string("preference: ") + what + ": expected a tensor on the " + (logp.cuda ? "GPU" : "CPU") +
                                ", where the log-probs are");
}

template <typename T>
T* optional(const char* what, const Maybe& t, int64_t n) {
  return t ? typed<T>(what, *t, {n}) : nullptr;
}

template <typename T>
Sequences<T> sequences_of(const Tensor& logp, const Maybe& ref_logp, bool ref_per_token, const Tensor& cu_targets) {
  const int64_t n = logp.numel(), sequences = cu_targets.numel() - 1;
  return {typed<T>("preference: logp", logp, {n}), optional<T>("preference: ref_logp", ref_logp, ref_per_token ? n : sequences), ref_per_token,
          offsets("preference: cu_targets", cu_targets, n, "log-probs")};
}

// numbers: beta, first, second, target, nll, transform, power, per_token (see csrc/math/preference.h).
template <typename T>
Pairs<T> pair_arguments(const Tensor& logp, const Maybe& ref_logp, bool ref_per_token, const Tensor& cu_targets, const Maybe& margin,
                        const Maybe& weight, const std::string& formula, const std::array<double, 8>& x, double tail,
                        const Tensor& losses, const Tensor& metrics, const Tensor& slopes) {
  beside(logp, "ref_logp", ref_logp), beside(logp, "margin", margin), beside(logp, "weight", weight);
  const int64_t pairs = (cu_targets.numel() - 1) / 2;
  if (cu_targets.numel() != 2 * pairs + 1) throw std::invalid_argument("preference: a pair has two sequences, got an odd number of them");
  return {sequences_of<T>(logp, ref_logp, ref_per_token, cu_targets),
          pairs,
          logp.numel(),
          optional<T>("preference: margin", margin, pairs),
          optional<T>("preference: weight", weight, pairs),
          tail,
          math::Formula{named<math::Pair>(kPairs, formula), x[0], x[1], x[2], x[3], x[4], static_cast<math::Transform>(static_cast<int>(x[5])),
                        x[6], x[7] != 0.0},
          typed<T>("preference: losses", losses, {pairs}),
          typed<T>("preference: metrics", metrics, {6, pairs}),
          typed<T>("preference: slopes", slopes, {2 * pairs})};
}

// numbers: beta, first, second, target.
template <typename T>
Singles<T> single_arguments(const Tensor& logp, const Maybe& ref_logp, bool ref_per_token, const Tensor& cu_targets, const Tensor& labels,
                            const Maybe& weight, const std::string& formula, const std::array<double, 4>& x, const Tensor& losses,
                            const Tensor& metrics, const Tensor& slopes) {
  beside(logp, "ref_logp", ref_logp), beside(logp, "labels", labels), beside(logp, "weight", weight);
  const int64_t sequences = cu_targets.numel() - 1;
  return {sequences_of<T>(logp, ref_logp, ref_per_token, cu_targets),
          sequences,
          logp.numel(),
          labels.check("preference: labels", DType::boolean, {sequences}).contiguous("preference: labels").ptr<bool>(),
          optional<T>("preference: weight", weight, sequences),
          math::SingleFormula{named<math::Single>(kSingles, formula), x[0], x[1], x[2], x[3]},
          typed<T>("preference: losses", losses, {sequences}),
          typed<T>("preference: metrics", metrics, {2, sequences}),
          typed<T>("preference: slopes", slopes, {sequences})};
}

template <typename T>
Spread<T> spread_arguments(const Tensor& upstream, const Tensor& slopes, const Tensor& cu_targets, int64_t unit, double tail,
                           const Tensor& gradient) {
  const int64_t sequences = cu_targets.numel() - 1, n = gradient.numel();
  upstream.check("preference: upstream gradient", dtype_of<T>(), {sequences / unit});
  return {upstream.ptr<T>(),
          sequences ? upstream.stride(0) : 0,
          typed<T>("preference: slopes", slopes, {sequences}),
          offsets("preference: cu_targets", cu_targets, n, "log-probs"),
          sequences,
          unit,
          n,
          tail,
          typed<T>("preference: gradient", gradient, {n})};
}

void pairs(const Tensor& logp, const Maybe& ref_logp, bool ref_per_token, const Tensor& cu_targets, const Maybe& margin,
           const Maybe& weight, const std::string& formula, const std::array<double, 8>& numbers, double tail, const Tensor& losses,
           const Tensor& metrics, const Tensor& slopes) {
  by_dtype(logp, [&]<typename T>(T) {
    auto arguments =
        pair_arguments<T>(logp, ref_logp, ref_per_token, cu_targets, margin, weight, formula, numbers, tail, losses, metrics, slopes);
    py::gil_scoped_release release;
    FA_CALL(preference_pairs, arguments);
  });
}

void singles(const Tensor& logp, const Maybe& ref_logp, bool ref_per_token, const Tensor& cu_targets, const Tensor& labels,
             const Maybe& weight, const std::string& formula, const std::array<double, 4>& numbers, const Tensor& losses,
             const Tensor& metrics, const Tensor& slopes) {
  by_dtype(logp, [&]<typename T>(T) {
    auto arguments =
        single_arguments<T>(logp, ref_logp, ref_per_token, cu_targets, labels, weight, formula, numbers, losses, metrics, slopes);
    py::gil_scoped_release release;
    FA_CALL(preference_singles, arguments);
  });
}

void spread(const Tensor& upstream, const Tensor& slopes, const Tensor& cu_targets, int64_t unit, double tail, const Tensor& gradient) {
  by_dtype(gradient, [&]<typename T>(T) {
    auto arguments = spread_arguments<T>(upstream, slopes, cu_targets, unit, tail, gradient);
    py::gil_scoped_release release;
    FA_CALL(preference_spread, arguments);
  });
}

#ifdef HAS_CUDA_preference
void pairs_cuda(const Tensor& logp, const Maybe& ref_logp, bool ref_per_token, const Tensor& cu_targets, const Maybe& margin,
                const Maybe& weight, const std::string& formula, const std::array<double, 8>& numbers, double tail, const Tensor& losses,
                const Tensor& metrics, const Tensor& slopes, uintptr_t stream) {
  by_dtype(logp, [&]<typename T>(T) {
    cuda::preference_pairs(
        pair_arguments<T>(logp, ref_logp, ref_per_token, cu_targets, margin, weight, formula, numbers, tail, losses, metrics, slopes),
        stream);
  });
}

void singles_cuda(const Tensor& logp, const Maybe& ref_logp, bool ref_per_token, const Tensor& cu_targets, const Tensor& labels,
                  const Maybe& weight, const std::string& formula, const std::array<double, 4>& numbers, const Tensor& losses,
                  const Tensor& metrics, const Tensor& slopes, uintptr_t stream) {
  by_dtype(logp, [&]<typename T>(T) {
    cuda::preference_singles(
        single_arguments<T>(logp, ref_logp, ref_per_token, cu_targets, labels, weight, formula, numbers, losses, metrics, slopes), stream);
  });
}

void spread_cuda(const Tensor& upstream, const Tensor& slopes, const Tensor& cu_targets, int64_t unit, double tail, const Tensor& gradient,
                 uintptr_t stream) {
  by_dtype(gradient, [&]<typename T>(T) {
    cuda::preference_spread(spread_arguments<T>(upstream, slopes, cu_targets, unit, tail, gradient), stream);
  });
}
#endif

}  // namespace

void bind_preference(py::module_& m) {
  m.def("preference_fits", &fits);
  m.def("preference_pairs", &pairs);
  m.def("preference_singles", &singles);
  m.def("preference_spread", &spread);
#ifdef HAS_CUDA_preference
  m.def("preference_pairs_cuda", &pairs_cuda);
  m.def("preference_singles_cuda", &singles_cuda);
  m.def("preference_spread_cuda", &spread_cuda);
#endif
}

}  // namespace fa
