// Generalized advantage estimation (arXiv:1506.02438, Eq. 16) as one affine recurrence, backwards over the tokens of a sequence:
//   x_t = value_t + lam advantage_t                    what token t hands to the token before it; at the end x = bootstrap
//   advantage_t = (reward_t - value_t) + gamma x_{t+1}
//   x_t = gamma lam x_{t+1} + (value_t + lam (reward_t - value_t))
// so advantage and next value need one number, not two, and a hole, which hands on what it got, is the identity map. Discounted
// returns are the same with value 0 and lam 1: advantage_t = x_t = reward_t + gamma x_{t+1}.
#pragma once
#include "affine.h"

namespace fa::math {

// surplus: reward - value.
template <typename Real>
FA_MATH Affine<Real> gae_map(Real surplus, Real value, Real gamma, Real lam) {
  return {gamma * lam, value + lam * surplus};
}

template <typename Real>
FA_MATH Real gae_advantage(Real surplus, Real gamma, Real x) {
  return surplus + gamma * x;
}

// Consecutive tokens as one function of what comes after them: x and the advantage of the first token of theirs that is not a hole,
// both affine in the x after the span. Without any such token (seen false) the advantage after the span is handed on.
// A span that holds the end of a sequence is closed: a constant. That is a flag and not a scale of 0, because 0 * NaN is NaN and
// one sequence's NaN must not reach another.
template <typename Real>
struct Span {
  Affine<Real> x;
  Affine<Real> advantage;
  bool seen, closed;
};

template <typename Real>
FA_MATH Span<Real> open_span() {
  return {identity<Real>(), {0, 0}, false, false};
}

template <typename Real>
FA_MATH Span<Real> sequence_end(Real bootstrap) {
  return {{0, bootstrap}, {0, 0}, true, true};
}

// The span with one more token, that is not a hole, in front.
template <typename Real>
FA_MATH Span<Real> with_token(const Affine<Real>& map, Real surplus, Real gamma, const Span<Real>& after) {
  return {compose(map, after.x), {gamma * after.x.scale, gae_advantage(surplus, gamma, after.x.shift)}, true, after.closed};
}

// front: the span of the earlier tokens, applied last.
template <typename Real>
FA_MATH Span<Real> join(const Span<Real>& front, const Span<Real>& back) {
  if (front.closed) return front;
  return {compose(front.x, back.x), front.seen ? compose(front.advantage, back.x) : back.advantage, front.seen || back.seen, back.closed};
}

}  // namespace fa::math
