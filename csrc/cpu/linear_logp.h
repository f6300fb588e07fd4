// Row kernels over logits [N, V]: fp32 (T = float) or bf16 (T = uint16_t). A row's result depends on that row alone, bit for bit.
#pragma once
#include <cstdint>

#include "isa.h"

namespace fa {

template <typename T>
struct LogpRows {
  const T* logits;  // [N, V], rows row_stride elements apart
  int64_t num_rows, vocab, row_stride;
  const int64_t* targets;  // [N] in [0, V)
  float inv_temperature, softcap;  // softcap 0: none
  float* logp;                     // [N] nats
  float* lse;                      // [N]
  float* entropy;                  // [N] or null
  bool* correct;                   // [N] target is the first arg-max
};

template <typename T>
struct GradRows {
  T* logits;  // [N, V] in: logits, out: their gradient
  int64_t num_rows, vocab, row_stride;
  const int64_t* targets;
  const float* lse;
  const float* entropy;    // [N], read where g_entropy is not null
  const float* g_logp;     // [N]
  const float* g_entropy;  // [N] or null
  float inv_temperature, softcap;
};

}  // namespace fa

FA_DECLARE(void logp_rows(const LogpRows<float>& rows); void logp_rows(const LogpRows<uint16_t>& rows);
           void grad_rows(const GradRows<float>& rows); void grad_rows(const GradRows<uint16_t>& rows);)
