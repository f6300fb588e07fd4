// Affine maps y = scale x + shift, the monoid of every backward scan: advantage_t = shift_t + scale_t advantage_{t+1}.
// A masked hole is the identity map, which is how values carry forward through it.
#pragma once
#include "exp.h"

namespace fa::math {

template <typename Real>
struct Affine {
  Real scale;
  Real shift;
};

template <typename Real>
FA_MATH Affine<Real> identity() {
  return {1, 0};
}

// first: applied to x first.
template <typename Real>
FA_MATH Affine<Real> compose(const Affine<Real>& after, const Affine<Real>& first) {
  return {after.scale * first.scale, after.scale * first.shift + after.shift};
}

template <typename Real>
FA_MATH Real apply(const Affine<Real>& map, Real x) {
  return map.scale * x + map.shift;
}

}  // namespace fa::math
