// Rows times int8 weights: out = (x · qᵀ) * scale + bias. An output is one running sum over k, so a row's result depends on that row alone.
#pragma once
#include <cstdint>

#include "isa.h"

namespace fa {

constexpr int64_t kInt8Columns = 16;  // outputs of a panel, on every instruction set
constexpr int64_t kInt8Depth = 4;     // consecutive k in one 32-bit word, the first in its low byte

struct Int8Product {
  const void* x;  // [m, k] fp32, or bf16; rows x_stride elements apart
  int64_t x_stride;
  bool bf16;
  const uint32_t* words;  // [ceil(n / 16)][ceil(k / 4)][16]; zeros where n and k have ended
  const float* scale;     // [n]
  const float* bias;      // [n] or null
  void* out;              // [m, n] contiguous, in the type of x
  int64_t m, n, k;
  bool dot;  // the machine has vdpbf16ps
};

}  // namespace fa

FA_DECLARE(void int8_product(const Int8Product& product);)
