// Row kernels over the logits [N, V] of a student and a teacher: fp32 (float) or bf16 (uint16_t) each. A row's result depends on
// that row alone, bit for bit.
#pragma once
#include <cstdint>

#include "../math/divergence.h"
#include "isa.h"

namespace fa {

// A row's numbers [5]: student's raw maximum and sum of e^((x - maximum) / temperature), teacher's, and the center of the gradient (math/divergence.h).
constexpr int kKlState = 5;

template <typename S, typename T>
struct KlRows {
  S* student;  // with g, in: logits, out: their gradient
  const T* teacher;
  int64_t num_rows, vocab, student_stride, teacher_stride;  // strides in elements
  math::Divergence kind;
  double beta;
  float inv_temperature;
  float* divergence;  // [N] nats; null: state is given, only the gradient is wanted
  float* state;       // [N, 5]
  const float* g;     // [N] dL/d(divergence), or null: no gradient
};

}  // namespace fa

FA_DECLARE(void kl_rows(const KlRows<float, float>& rows); void kl_rows(const KlRows<float, uint16_t>& rows);
           void kl_rows(const KlRows<uint16_t, float>& rows); void kl_rows(const KlRows<uint16_t, uint16_t>& rows);)
