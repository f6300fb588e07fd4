// Online softmax over a row, and the gradient of its log-prob and entropy. All z are logits after soft-cap and temperature.
//   lse = log sum e^z     logp = z_target - lse     H = lse - E[z] = log S - W / S,  S = sum e^(z-m), W = sum (z-m) e^(z-m)
//   d/dz_j (g logp + g_H H) = g (onehot_j - p_j) - g_H p_j (log p_j + H)
#pragma once
#include "exp.h"

namespace fa::math {

// z - m is raised to this before it is weighted by e^(z-m) = 0: -inf * 0 would be NaN.
constexpr float kFloor = -100.0f;

template <typename Real>
struct Online {
  Real max = -INFINITY;
  Real sum = 0;       // of e^(z - max)
  Real weighted = 0;  // of (z - max) e^(z - max)
};

template <typename Real>
FA_MATH Online<Real> merge(const Online<Real>& a, const Online<Real>& b) {
  if (a.sum == 0) return b;  // nothing, or nothing but -inf; a NaN sum goes on to make the row NaN
  if (b.sum == 0) return a;
  const Real max = a.max > b.max ? a.max : b.max;
  const Real down_a = a.max == max ? 0 : a.max - max, down_b = b.max == max ? 0 : b.max - max;
  const Real scale_a = ::exp(down_a), scale_b = ::exp(down_b);
  Online<Real> out;
  out.max = max;
  out.sum = scale_a * a.sum + scale_b * b.sum;
  // A side that vanishes may be infinitely far down: it adds nothing to the weighted sum, not NaN.
  out.weighted = (scale_a == 0 ? 0 * a.sum : scale_a * (a.weighted + down_a * a.sum)) +
                 (scale_b == 0 ? 0 * b.sum : scale_b * (b.weighted + down_b * b.sum));
  return out;
}

template <typename Real>
FA_MATH Real log_sum(const Online<Real>& o) {
  return ::log(o.sum);
}
template <typename Real>
FA_MATH Real entropy(const Online<Real>& o) {
  return ::log(o.sum) - o.weighted / o.sum;
}

// One element's logit: soft-cap (0: none), then temperature. -inf stays, as probability 0; the cap would lift it to -softcap.
template <typename U, typename F>
FA_MATH F soften(F x, float softcap, float inv_softcap, float inv_temperature) {
  if (softcap > 0.0f) {
    const F capped = tanh<U, F>(x * inv_softcap) * softcap;
    x = x == -INFINITY ? x : capped;
  }
  return x * inv_temperature;
}

// The gradient at an element that is not the target, with respect to z. logp: z - lse of the element.
template <typename U, typename F>
FA_MATH F grad_other(F logp, float g_logp, float g_entropy, float row_entropy) {
  const F p = exp<U, F>(logp);
  const F finite = logp < kFloor ? F{} + kFloor : logp;
  return p * (-g_logp - g_entropy * (finite + row_entropy));
}

}  // namespace fa::math
