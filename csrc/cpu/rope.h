// Rotary embedding of half-split heads: out = x cos + rotate_half(x) sin, rotate_half(x1, x2) = (-x2, x1).
// T: float, or uint16_t for bf16; computed in fp32, rounded once.
#pragma once
#include <cstdint>

#include "isa.h"

namespace fa {

template <typename T>
struct Rope {
  const T* x;    // [batch, heads, length, dim], rows contiguous; strides in elements
  T* out;        // the same shape
  const T* cos;  // [batch, length, dim] contiguous; the stride of its batch is 0 where all sequences share it
  const T* sin;
  int64_t batch, heads, length, dim, cos_stride;
  int64_t x_stride[3], out_stride[3];
  bool transposed;  // the transpose of the rotation: the gradient's way
};

}  // namespace fa

FA_DECLARE(void rope(const Rope<float>& of); void rope(const Rope<uint16_t>& of);)
