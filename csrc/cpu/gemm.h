// Matrix products of fp32 or bf16 operands with fp32 sums, for CPUs on which torch's are slow: AVX2 without AVX-512 (bf16 above all).
#pragma once
#include <cstdint>

#include "isa.h"

namespace fa {

// c (+)= alpha * (a * b + bias). a [m, k] and b [k, n] have any strides (in elements) and one type; c has contiguous rows.
struct Gemm {
  const void *a, *b;  // fp32, or bf16
  bool bf16;
  int64_t a_row, a_column, b_row, b_column;
  const void* packed;  // b as `gemm_pack` lays it out, in the type of a, or null; then b is not read
  const float* bias;   // [n] or null
  float* c;
  int64_t c_row, m, n, k;
  float alpha;
  bool add;  // to what is in c
};

}  // namespace fa

FA_DECLARE(void gemm(const Gemm& product);
           // b → [ceil(n / gemm_panel())][k][gemm_panel()], zeros beside
           void gemm_pack(const Gemm& product, void* packed); int64_t gemm_panel();
           // total += alpha * part (bf16), `size` numbers of each
           void add_widened(float* total, const uint16_t* part, int64_t size, float alpha);)
