// silu(gate) * up over flat, contiguous tensors of one size. T: float, or uint16_t for bf16; computed in fp32, rounded once.
#pragma once
#include <cstdint>

#include "isa.h"

namespace fa {

template <typename T>
struct Swiglu {
  const T* gate;
  const T* up;
  int64_t size;
};

template <typename T>
struct SwigluGrads {
  const T* grad;  // dL/dout
  T* gate;
  T* up;
};

}  // namespace fa

FA_DECLARE(void swiglu(const Swiglu<float>& of, float* out); void swiglu(const Swiglu<uint16_t>& of, uint16_t* out);
           void swiglu_backward(const Swiglu<float>& of, const SwigluGrads<float>& to);
           void swiglu_backward(const Swiglu<uint16_t>& of, const SwigluGrads<uint16_t>& to);)
