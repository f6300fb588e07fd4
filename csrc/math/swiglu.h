// SwiGLU of one element: silu(gate) * up, silu(x) = x * sigmoid(x), and its gradients.
// F: float or a vector of them; U: uint32_t or a vector of as many.
#pragma once
#include "exp.h"

namespace fa::math {

template <typename U, typename F>
FA_MATH F sigmoid(F x) {
  return 1.0f / (1.0f + exp<U>(-x));
}

template <typename U, typename F>
FA_MATH F swiglu(F gate, F up) {
  return gate / (1.0f + exp<U>(-gate)) * up;
}

// gate and up come back as dL/dgate and dL/dup.
template <typename U, typename F>
FA_MATH void swiglu_backward(F grad, F& gate, F& up) {
  const F s = sigmoid<U>(gate);
  const F slope = s + gate * s * (1.0f - s);
  const F d_up = grad * gate * s;
  gate = grad * up * slope;
  up = d_up;
}

}  // namespace fa::math
