// Divergences of a student from a teacher, one vocabulary element at a time. s, t: log-probs of the element; p_s, p_t: probabilities.
//   forward  KL(T || S) = sum p_t (t - s)              d/dz_s = p_s - p_t
//   reverse  KL(S || T) = sum p_s (s - t)              d/dz_s = p_s ((s - t) - sum p_s (s - t))
//   jsd      beta KL(T || M) + (1 - beta) KL(S || M)   d/dz_s = (1 - beta) p_s ((s - m) - sum p_s (s - m)),  M = beta p_t + (1 - beta) p_s
// Summed as terms that are never negative: p_t (t - s) - p_t + p_s, and so on; the added parts sum to zero over the vocabulary. Near
// S = T the plain terms cancel to their last bits, and an error of a normalizer shifts their sum; here it is of second order.
// The gradient's sums ("center") stay plain: they must carry the same shift as the element they are subtracted from.
#pragma once
#include "exp.h"

namespace fa::math {

enum class Divergence : int { forward_kl = 0, reverse_kl = 1, jsd = 2 };

template <typename F>
FA_MATH F magnitude(F x) {
  return x < 0.0f ? -x : x;
}

// What is the same for every element of a row. Sums are kept and not their logarithms, whose last bit is 5e-7
// of a probability. x: raw logits of student and teacher.
struct RowPair {
  float inv_temperature;
  float student_max, student_scale;  // raw maximum; 1 / the sum of e^((x - max) / temperature)
  float teacher_max, teacher_scale;
  float log_ratio;            // of the teacher's sum to the student's
  float shift;                // t - s = (x_t - x_s) / temperature - shift
  bool far;                   // shift is so large that this loses digits: both are taken from their maxima then
  float beta, one_less_beta;  // the weights of teacher and student in M
};

// state: the student's raw maximum and sum, then the teacher's.
FA_MATH RowPair row_pair(float inv_temperature, const float* state, double beta) {
  const double maxima = (static_cast<double>(state[2]) - state[0]) * inv_temperature;
  const double log_ratio = ::log(static_cast<double>(state[3]) / state[1]);
  RowPair out;
  out.inv_temperature = inv_temperature;
  out.student_max = state[0], out.student_scale = static_cast<float>(1.0 / state[1]);
  out.teacher_max = state[2], out.teacher_scale = static_cast<float>(1.0 / state[3]);
  out.log_ratio = static_cast<float>(log_ratio);
  out.shift = static_cast<float>(maxima + log_ratio);
  out.far = !(magnitude(out.shift) < 8.0f);
  out.beta = static_cast<float>(beta), out.one_less_beta = static_cast<float>(1.0 - beta);
  return out;
}

// p_s, p_t and d = t - s of an element. d is NaN where both logits are -inf; then both probabilities are 0.
template <typename F>
struct Element {
  F student, teacher, gap;
};
template <typename U, typename F>
FA_MATH Element<F> element(F x_student, F x_teacher, const RowPair& r) {
  const F s = (x_student - r.student_max) * r.inv_temperature, t = (x_teacher - r.teacher_max) * r.inv_temperature;
  Element<F> e;
  e.student = exp<U, F>(s) * r.student_scale;
  e.teacher = exp<U, F>(t) * r.teacher_scale;
  e.gap = r.far ? (t - s) - r.log_ratio : (x_teacher - x_student) * r.inv_temperature - r.shift;
  return e;
}

constexpr float kNear = 0.5f;  // |d| below which the second-order series is used

// e^-d - 1 + d for |d| <= kNear.
template <typename F>
FA_MATH F bregman(F d) {
  F p = d * -2.7557319e-6f + 2.4801587e-5f;
  p = p * d - 1.9841270e-4f;
  p = p * d + 1.3888889e-3f;
  p = p * d - 8.3333333e-3f;
  p = p * d + 4.1666667e-2f;
  p = p * d - 1.6666667e-1f;
  p = p * d + 0.5f;
  return (p * d) * d;
}

// p (d - 1) + q, with q = p e^-d: the term of sum p d that is never negative.
template <typename F>
FA_MATH F kl_term(F p, F q, F d) {
  const F term = magnitude(d) < kNear ? p * bregman(d) : p * (d - 1.0f) + q;
  return p == 0.0f ? q : term;
}

// log(1 + x) for -1 < x <= 0, given y = 1 + x to full precision, and (1 + x) log(1 + x) - x, of second order in x.
template <typename F>
struct Log {
  F log1p, excess;
};
template <typename U, typename F>
FA_MATH Log<F> log_below_one(F x, F y) {
  // y = 2^-halvings (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); where halvings is 0, f is x, unrounded. Cephes' polynomial for log(1 + f).
  const U bits = bits_of<U>(y);
  const U halvings = (0x3f3504f3u + 0x7fffffu - bits) >> 23;
  const F count = bits_of<F>(static_cast<U>(halvings + 0x4b000000u)) - 8388608.0f;
  const F scaled = bits_of<F>(static_cast<U>(bits + (halvings << 23))) - 1.0f;
  const F f = count == 0.0f ? x : scaled;
  F p = f * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const F log1p = (f + (f * f) * (p * f - 0.5f)) - count * 0.693147180559945f;
  Log<F> out;
  out.log1p = x == x ? log1p : x;
  out.excess = count == 0.0f ? (x * x) * (x * (p * y - 0.5f) + 0.5f) : y * out.log1p - x;
  return out;
}

// The two numbers of a JSD element: its term, and s - m. Everything is taken from the larger of the two probabilities.
template <typename F>
struct Mixed {
  F term, to_mixture;
};
template <typename U, typename F>
FA_MATH Mixed<F> mixed(const Element<F>& e, const RowPair& r) {
  const F larger = e.gap > 0.0f ? e.teacher : e.student;
  const F weight = e.gap > 0.0f ? F{} + r.one_less_beta : F{} + r.beta;  // of the smaller one
  const F rest = e.gap > 0.0f ? F{} + r.beta : F{} + r.one_less_beta;
  F a = magnitude(e.gap);
  a = a > 100.0f ? F{} + 100.0f : a;  // e^-a is 0 there, and 0 * infinity would be NaN
  a = larger == 0.0f ? F{} : a;
  const F down = exp<U, F>(-a);
  const F series = bregman(a) - a, less = a < kNear ? series : down - 1.0f;  // expm1(-a)
  const Log<F> log = log_below_one<U, F>(weight * less, rest + weight * down);
  const F back = a < kNear ? down * bregman(-a) : (1.0f - down) - a * down;  // e^-a (e^a - 1 - a)
  Mixed<F> out;
  out.term = larger * (weight * back - log.excess);
  out.to_mixture = e.gap > 0.0f ? -(a + log.log1p) : -log.log1p;
  return out;
}

// The element's part of the gradient that does not need the row's center: of the forward KL all of it.
template <Divergence kKind, typename U, typename F>
FA_MATH F raw_slope(const Element<F>& e, const RowPair& r) {
  if constexpr (kKind == Divergence::forward_kl)
    return magnitude(e.gap) < kNear ? e.teacher * (bregman(e.gap) - e.gap) : e.student - e.teacher;
  else if constexpr (kKind == Divergence::reverse_kl)
    return e.student == 0.0f ? F{} : -e.gap;
  else
    return mixed<U, F>(e, r).to_mixture;
}

// d divergence / d z_s of an element.
template <Divergence kKind, typename F>
FA_MATH F slope(F student, F raw, const RowPair& r, float center) {
  if constexpr (kKind == Divergence::forward_kl) return raw;
  if constexpr (kKind == Divergence::reverse_kl) return student * (raw - center);
  return (student * r.one_less_beta) * (raw - center);
}

// Adds an element to the divergence and to the center of its gradient; returns its raw slope.
template <Divergence kKind, typename U, typename F>
FA_MATH F add_element(const Element<F>& e, const RowPair& r, F& value, F& center) {
  F raw;
  if constexpr (kKind == Divergence::jsd) {
    const Mixed<F> m = mixed<U, F>(e, r);
    value += m.term;
    raw = m.to_mixture;
  } else {
    const bool forward = kKind == Divergence::forward_kl;
    value += forward ? kl_term(e.teacher, e.student, e.gap) : kl_term(e.student, e.teacher, -e.gap);
    raw = raw_slope<kKind, U, F>(e, r);
  }
  if constexpr (kKind != Divergence::forward_kl) center += e.student * raw;
  return raw;
}

}  // namespace fa::math
