// Loops over numbers that do not know each other: vectors, and a shorter one at the end.
#pragma once
#include "simd.h"

namespace fa::FA_ISA {

// The first n <= kLanes elements, the others zero.
template <typename T>
FA_SIMD vf load_some(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_part(p, n, 0.0f);
}
template <typename T>
FA_SIMD void store_some(T* p, vf v, int64_t n) {
  n == kLanes ? store(p, v) : store_part(p, v, n);
}

// run(i, n) of every vector of [begin, end): its first element and how many are there.
template <typename Run>
FA_SIMD void each_vector(int64_t begin, int64_t end, const Run& run) {
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes) run(i, kLanes);
  if (i < end) run(i, end - i);
}

// The same of [0, size) by all threads, where that is worth it.
template <typename Run>
static inline void each_vector_of_all(int64_t size, const Run& run) {
  constexpr int64_t kBlock = 8192;  // elements a task
#pragma omp parallel for schedule(static) if (size > 4 * kBlock)
  for (int64_t begin = 0; begin < size; begin += kBlock) each_vector(begin, begin + kBlock < size ? begin + kBlock : size, run);
}

}  // namespace fa::FA_ISA
