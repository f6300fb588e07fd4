// y = x / rms(x) * weight, rms(x) = sqrt(mean(x^2) + eps), over the last dimension of contiguous rows.
// T: float, or uint16_t for bf16; computed in fp32, rounded once.
#pragma once
#include <cstdint>

#include "isa.h"

namespace fa {

template <typename T>
struct RmsNorm {
  const T* x;       // [rows, width]
  const T* weight;  // [width]
  int64_t rows, width;
  float eps;
};

constexpr int64_t kRmsNormRows = 64;  // rows that add to one line of `partial`

template <typename T>
struct RmsNormGrads {
  const T* grad;   // [rows, width], dL/dy
  T* x;            // [rows, width]
  float* weight;   // [width], or null where it is not asked for
  float* partial;  // [ceil(rows / kRmsNormRows), width], scratch for it
};

}  // namespace fa

FA_DECLARE(void rms_norm(const RmsNorm<float>& of, float* out); void rms_norm(const RmsNorm<uint16_t>& of, uint16_t* out);
           void rms_norm_backward(const RmsNorm<float>& of, const RmsNormGrads<float>& to);
           void rms_norm_backward(const RmsNorm<uint16_t>& of, const RmsNormGrads<uint16_t>& to);)
