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

// out may be the logits themselves, or bf16 in the first half of each fp32 row: elements are read before anything later is written.
template <typename T, typename U = T>
struct GradRows {
  const T* logits;  // [N, V]
  int64_t num_rows, vocab, row_stride;
  U* out;  // [N, V] their gradient, rows out_stride elements apart
  int64_t out_stride;
  const int64_t* targets;
  const float* lse;
  const float* entropy;    // [N], read where g_entropy is not null
  const float* g_logp;     // [N]
  const float* g_entropy;  // [N] or null
  float inv_temperature, softcap;
};

// bf16 operands, fp32 result; strides in elements, the other dimension contiguous.
struct Bf16Product {
  const uint16_t *a, *b;
  float* out;         // [m, n]
  const float* bias;  // [n] or null; product_rows alone
  int64_t m, n, k, a_stride, b_stride, out_stride;
  float alpha;  // product_columns alone
  bool add;     // to what is in out; product_columns alone
  bool dot;     // the machine has vdpbf16ps
};

}  // namespace fa

FA_DECLARE(void logp_rows(const LogpRows<float>& rows); void logp_rows(const LogpRows<uint16_t>& rows);
           void grad_rows(const GradRows<float>& rows); void grad_rows(const GradRows<uint16_t>& rows);
           void grad_rows(const GradRows<float, uint16_t>& rows);
           // out = a [m, k] * b [n, k]^T + bias; where k is odd a row of a is followed by a zero
           void product_rows(const Bf16Product& product);
           // out (+)= alpha * a [k, m]^T * b [k, n]
           void product_columns(const Bf16Product& product);)
