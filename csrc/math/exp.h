// exp and tanh in fp32, one polynomial for every lane width: scalars on host and device, and the CPU's vectors (csrc/cpu/simd.h).
// exp: x = n ln2 + r, |r| <= ln2/2, e^r by the degree-7 Cephes polynomial, scaled by 2^n through the exponent bits. Within 1.5 ulp
// (tests/test_logits.py). e^-inf and everything below -87 is 0 (no denormals), above 88.37 infinity (the true limit is 88.72), NaN is NaN.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FA_MATH static __host__ __device__ __forceinline__
#else
#define FA_MATH static inline __attribute__((always_inline))
#endif

namespace fa::math {

template <typename To, typename From>
FA_MATH To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bits_of: sizes differ");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// F: float or a vector of them; U: uint32_t or a vector of as many.
template <typename U, typename F>
FA_MATH F exp(F x) {
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits; 127 more is the exponent's bias.
  const float magic = 12582912.0f + 127.0f;
  const F shifted = x * 1.44269504088896341f + magic;
  const F n = shifted - magic;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  const F scaled = p * bits_of<F>(static_cast<U>(bits_of<U>(shifted) << 23));
  const F above = x > 88.37f ? F{} + INFINITY : scaled;
  return x < -87.0f ? F{} : above;
}

// tanh: an odd polynomial (Cephes) below 0.625, where 1 - 2 / (e^2x + 1) would cancel.
template <typename U, typename F>
FA_MATH F tanh(F x) {
  const F y = x * x;
  F p = y * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * y - 5.37397155531e-2f;
  p = p * y + 1.33314422036e-1f;
  p = p * y - 3.33332819422e-1f;
  const F small = (p * y) * x + x;
  const F big = 1.0f - 2.0f / (exp<U>(x + x) + 1.0f);
  return y < 0.390625f ? small : big;
}

FA_MATH float exp(float x) { return exp<uint32_t, float>(x); }
FA_MATH float tanh(float x) { return tanh<uint32_t, float>(x); }

}  // namespace fa::math
