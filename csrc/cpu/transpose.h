// Eight lines of numbers beside each other → their columns, where vectors are eight wide.
#pragma once
#include "simd.h"

#if defined(__AVX2__) && !defined(__AVX512F__)
#include <immintrin.h>

namespace fa::FA_ISA {

FA_SIMD __m128 load_half(const float* p) { return _mm_loadu_ps(p); }
FA_SIMD __m128 load_half(const uint16_t* p) {
  const __m128i words = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(words), 16));
}

// Four numbers of each line, the lines `line` apart, of which the first kLines are there and the others zeros: out[i] holds number i of all.
// Lines i and i + 4 share a vector from the start: to move numbers from one half of a vector to the other takes eight steps where
// vectors are 128 bits wide inside (Zen 1).
template <int kLines, typename T>
FA_SIMD void transpose_quad(const T* from, int64_t line, vf (&out)[4]) {
  __m256 r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m128 low = load_half(from + i * line), high = i + 4 < kLines ? load_half(from + (i + 4) * line) : _mm_setzero_ps();
    r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
  }
  const __m256 t0 = _mm256_unpacklo_ps(r[0], r[1]), t1 = _mm256_unpackhi_ps(r[0], r[1]);
  const __m256 t2 = _mm256_unpacklo_ps(r[2], r[3]), t3 = _mm256_unpackhi_ps(r[2], r[3]);
  out[0] = (vf)_mm256_shuffle_ps(t0, t2, 0x44);
  out[1] = (vf)_mm256_shuffle_ps(t0, t2, 0xee);
  out[2] = (vf)_mm256_shuffle_ps(t1, t3, 0x44);
  out[3] = (vf)_mm256_shuffle_ps(t1, t3, 0xee);
}

}  // namespace fa::FA_ISA
#endif
