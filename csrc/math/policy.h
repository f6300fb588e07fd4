// Policy-gradient losses of one token and their slopes, for any lane: float, a vector of floats, double. Host and device.
//   x = logp - old_logp, r = e^x; A the advantage; the slope is d loss / d x (for a sequence's ratio: d / d of its mean log-ratio).
//   reinforce  -A logp                    clip   max(-A r, -A clamp(r)), a negative A at most -A dual_clip
//   cispo      -A sg(clamp(r)) logp       sapo   -A 4/tau sigmoid(tau (r - 1)), tau by the sign of A
//   gspo       clip of s = e^mean(x)      gmpo   -A e^mean(m), m = x limited to epsilon in the direction that A rewards
//   KL to the reference, d = logp - ref:  k1 d   k2 d^2/2   k3 e^-d - 1 + d
// The equations in torch, with papers: fastalign/ops/policy_equations.py. Log-ratios saturate at +-kMaxLogRatio with slope 0, so
// that no exponential overflows and 0 * inf never appears; a NaN stays a NaN.
#pragma once
#include <type_traits>

#include "exp.h"

namespace fa::math {

enum class PolicyLoss : int64_t { reinforce, clip, cispo, sapo, gspo, gspo_token, gmpo };
enum class Advantage : int64_t { all, positive, indicator };  // A, max(A, 0), 1 where A > 0
enum class KlEstimator : int64_t { none, k1, k2, k3 };
enum class Correction : int64_t { none, truncate, mask, sequence_truncate, sequence_mask };

constexpr float kMaxLogRatio = 20.0f;
constexpr float kLowestLogp = -1e4f;  // gspo_token: below it (minus infinity) a token has no slope of its own

template <typename Real>
struct Policy {
  PolicyLoss loss;
  Advantage advantage;
  KlEstimator kl;
  Correction correction;
  Real low, high;                  // clip range of the ratio
  Real dual_clip;                  // 0: none
  Real tau_positive, tau_negative;  // sapo
  Real log_epsilon;                // gmpo
  Real kl_coef, entropy_coef;
  Real correction_low, correction_high;

  bool has_sequence_ratio() const {
    return loss == PolicyLoss::gspo || loss == PolicyLoss::gspo_token || loss == PolicyLoss::gmpo;
  }
  bool has_sequence_correction() const { return correction == Correction::sequence_truncate || correction == Correction::sequence_mask; }
};

template <typename F>
struct Term {
  F value, slope;
};

// F: float, double or a vector of floats; U: as many uint32_t (unused for double).
template <typename U, typename F>
FA_MATH F exp_of(F x) {
  if constexpr (std::is_same_v<F, double>)
    return ::exp(x);
  else
    return exp<U, F>(x);
}

// e^x - 1 and e^x - 1 - x, both without cancellation near 0: x = n ln2 + r, e^r - 1 = r + r^2 P(r), then scaled by 2^n.
template <typename F>
struct Expm1 {
  F value, beyond_linear;
};
template <typename U, typename F>
FA_MATH Expm1<F> expm1_of(F x) {
  if constexpr (std::is_same_v<F, double>) {
    const double value = ::expm1(x);
    return {value, x > -1e-4 && x < 1e-4 ? x * x * (0.5 + x * (1.0 / 6 + x / 24)) : value - x};
  } else {
    const float magic = 12582912.0f + 127.0f;
    const F shifted = x * 1.44269504088896341f + magic;
    const F n = shifted - magic;
    const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const F square = (p * r) * r;
    const F scale = bits_of<F>(static_cast<U>(bits_of<U>(shifted) << 23));
    const F scaled = (square + r) * scale + (scale - 1.0f);
    const F value = x > 88.37f ? F{} + INFINITY : x < -87.0f ? F{} - 1.0f : scaled;
    return {value, n == 0.0f ? square : value - x};
  }
}

template <typename F>
FA_MATH F saturated(F log_ratio) {
  const F most = F{} + kMaxLogRatio;
  return log_ratio > most ? most : log_ratio < -most ? -most : log_ratio;
}
template <typename F>
FA_MATH auto is_saturated(F log_ratio) {
  return (log_ratio > kMaxLogRatio) | (log_ratio < -kMaxLogRatio);
}

// What the loss reads for the advantage.
template <typename F>
FA_MATH F advantage_of(Advantage rule, F advantage) {
  if (rule == Advantage::all) return advantage;
  const F zero = F{};
  if (rule == Advantage::positive) return advantage < zero ? zero : advantage;
  return advantage > zero ? zero + 1.0f : zero;
}

// max(-A r, -A clamp(r, low, high)), dual clip included.
template <typename F, typename Real>
FA_MATH Term<F> clipped(const Policy<Real>& p, F ratio, F advantage) {
  const F zero = F{};
  const F bounded = ratio < p.low ? zero + p.low : ratio > p.high ? zero + p.high : ratio;
  const F plain = -advantage * ratio, limited = -advantage * bounded;
  Term<F> term{plain < limited ? limited : plain, plain < limited ? zero : plain};
  if (p.dual_clip > 0) {
    const F most = -advantage * p.dual_clip;
    const auto over = (advantage < zero) & (term.value > most);
    term = {over ? most : term.value, over ? zero : term.slope};
  }
  return term;
}

// The loss of one token. log_ratio is the token's, or its sequence's where the row has a sequence ratio; ratio = exp(saturated).
template <typename U, typename F, typename Real>
FA_MATH Term<F> surrogate(const Policy<Real>& p, F logp, F log_ratio, F ratio, F advantage) {
  const F zero = F{};
  if (p.loss == PolicyLoss::reinforce) return {advantage == zero ? zero : -advantage * logp, -advantage};
  if (p.loss == PolicyLoss::cispo) {
    const F weight = advantage * (ratio < p.low ? zero + p.low : ratio > p.high ? zero + p.high : ratio);
    return {weight == zero ? zero : -weight * logp, -weight};
  }
  Term<F> term;
  if (p.loss == PolicyLoss::sapo) {
    const F tau = advantage > zero ? zero + p.tau_positive : zero + p.tau_negative;
    const F e = exp_of<U, F>(tau * (1.0f - ratio));
    const F gate = 1.0f / (1.0f + e);
    term = {-advantage * gate * (4.0f / tau), -advantage * (4.0f * gate * (e * gate)) * ratio};
  } else if (p.loss == PolicyLoss::gmpo) {
    term = {-advantage * ratio, -advantage * ratio};
  } else {
    term = clipped(p, ratio, advantage);
  }
  auto flat = is_saturated(log_ratio);
  if (p.loss == PolicyLoss::gspo_token) flat = logp < kLowestLogp;
  return {term.value, flat ? zero : term.slope};
}

// What a token adds to its sequence's mean log-ratio, and the slope of that in its own log-prob.
template <typename F, typename Real>
FA_MATH Term<F> contribution(const Policy<Real>& p, F log_ratio, F advantage) {
  const F zero = F{}, one = zero + 1.0f;
  if (p.loss != PolicyLoss::gmpo) return {log_ratio, one};
  const F sign = advantage < zero ? -one : one;
  const F along = sign * saturated(log_ratio);
  const auto limited = along > p.log_epsilon;
  return {sign * (limited ? zero + p.log_epsilon : along), (limited | is_saturated(log_ratio)) ? zero : one};
}

// KL(policy, reference) estimated from this token, and its slope in logp.
template <typename U, typename F>
FA_MATH Term<F> divergence(KlEstimator kind, F logp, F ref_logp) {
  const F zero = F{}, d = logp - ref_logp;
  if (kind == KlEstimator::k1) return {d, zero + 1.0f};
  if (kind == KlEstimator::k2) return {d * d * 0.5f, d};
  const auto over = -d > kMaxLogRatio;
  const Expm1<F> e = expm1_of<U, F>(over ? zero + kMaxLogRatio : -d);
  return {e.beyond_linear, over ? zero : -e.value};
}

// The detached weight of an off-policy sample: value; slope is 1 where the ratio was out of range (a count, not a slope).
template <typename U, typename F, typename Real>
FA_MATH Term<F> correction(const Policy<Real>& p, F log_ratio) {
  const F zero = F{}, one = zero + 1.0f, ratio = exp_of<U, F>(saturated(log_ratio));
  if (p.correction == Correction::truncate || p.correction == Correction::sequence_truncate) {
    const auto over = ratio > p.correction_high;
    return {over ? zero + p.correction_high : ratio, over ? one : zero};
  }
  const auto outside = (ratio < p.correction_low) | (ratio > p.correction_high);
  return {outside ? zero : ratio, outside ? one : zero};
}

}  // namespace fa::math
