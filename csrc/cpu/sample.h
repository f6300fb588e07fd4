// One draw a row from logits [N, V]: fp32 (T = float) or bf16 (T = uint16_t). A row's draw depends on that row alone.
#pragma once
#include <cstdint>

#include "isa.h"

namespace fa {

template <typename T>
struct SampleRows {
  const T* logits;  // [N, V], rows row_stride elements apart; -inf is never drawn
  int64_t num_rows, vocab, row_stride;
  const double* uniforms;    // [N] in [0, 1)
  const float* temperature;  // [N]; 0: the first arg-max
  const int64_t* top_k;      // [N]; 0: off
  const float* top_p;        // [N]; 1: off
  const float* min_p;        // [N]; 0: off
  float softcap;             // 0: none
  int64_t* tokens;           // [N]; -1: the row holds NaN or +inf, or nothing but -inf
  float* kept;               // [N] probability that truncation left
};

}  // namespace fa

FA_DECLARE(void sample(const SampleRows<float>& rows); void sample(const SampleRows<uint16_t>& rows);)
