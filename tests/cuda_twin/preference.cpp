// The preference losses' CUDA kernels in the twin module: pointers as integers (0: null), no checks.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "cuda/preference.h"

namespace {

template <typename T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

template <typename T>
void pairs(uintptr_t logp, uintptr_t ref_logp, bool ref_per_token, uintptr_t cu_targets, int64_t num_pairs, uintptr_t margin, uintptr_t weight,
           double tail, int pair, std::array<double, 8> x, uintptr_t losses, uintptr_t metrics, uintptr_t slopes) {
  const fa::math::Formula formula{static_cast<fa::math::Pair>(pair), x[0], x[1], x[2], x[3], x[4],
                                  static_cast<fa::math::Transform>(static_cast<int>(x[5])), x[6], x[7] != 0.0};
  fa::cuda::preference_pairs(fa::Pairs<T>{{at<const T>(logp), at<const T>(ref_logp), ref_per_token, at<const int32_t>(cu_targets)},
                                          num_pairs, 0, at<const T>(margin), at<const T>(weight), tail, formula, at<T>(losses),
                                          at<T>(metrics), at<T>(slopes)},
                             0);
}

template <typename T>
void singles(uintptr_t logp, uintptr_t ref_logp, bool ref_per_token, uintptr_t cu_targets, int64_t num_sequences, uintptr_t labels,
             uintptr_t weight, int single, std::array<double, 4> x, uintptr_t losses, uintptr_t metrics, uintptr_t slopes) {
  const fa::math::SingleFormula formula{static_cast<fa::math::Single>(single), x[0], x[1], x[2], x[3]};
  fa::cuda::preference_singles(fa::Singles<T>{{at<const T>(logp), at<const T>(ref_logp), ref_per_token, at<const int32_t>(cu_targets)},
                                              num_sequences, 0, at<const bool>(labels), at<const T>(weight), formula, at<T>(losses),
                                              at<T>(metrics), at<T>(slopes)},
                               0);
}

template <typename T>
void spread(uintptr_t upstream, int64_t stride, uintptr_t slopes, uintptr_t cu_targets, int64_t num_sequences, int64_t unit, double tail,
            uintptr_t gradient) {
  fa::cuda::preference_spread(fa::Spread<T>{at<const T>(upstream), stride, at<const T>(slopes), at<const int32_t>(cu_targets), num_sequences,
                                            unit, 0, tail, at<T>(gradient)},
                              0);
}

}  // namespace

void bind_preference(pybind11::module_& m) {
  m.def("preference_pairs_f32", &pairs<float>);
  m.def("preference_pairs_f64", &pairs<double>);
  m.def("preference_singles_f32", &singles<float>);
  m.def("preference_singles_f64", &singles<double>);
  m.def("preference_spread_f32", &spread<float>);
  m.def("preference_spread_f64", &spread<double>);
}
