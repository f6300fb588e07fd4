// Vectors as wide as the instruction set, by the compiler's vector extension (g++ and clang++, any architecture).
// Everything is `static inline`: three copies with different instructions must never be merged by the linker.
#pragma once
#include <cstdint>
#include <cstring>

namespace fa::FA_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

#define FA_SIMD static inline __attribute__((always_inline))

FA_SIMD vf splat(float x) { return x - vf{}; }
FA_SIMD vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FA_SIMD void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }

// bfloat16 is the high half of a float.
FA_SIMD vf load(const uint16_t* p) {
  vh h;
  std::memcpy(&h, p, sizeof h);
  return (vf)(__builtin_convertvector(h, vu) << 16);
}
// Round to nearest even; NaN stays NaN (the rounding could carry it into infinity).
FA_SIMD void store(uint16_t* p, vf v) {
  vu bits = (vu)v;
  vu rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  vh h = __builtin_convertvector(v == v ? rounded : vu{} + 0x7fc0u, vh);
  std::memcpy(p, &h, sizeof h);
}

FA_SIMD float to_float(float x) { return x; }
FA_SIMD float to_float(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
FA_SIMD void from_float(float* p, float x) { *p = x; }
FA_SIMD void from_float(uint16_t* p, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  *p = x == x ? static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : 0x7fc0;
}

// The first `n` < kLanes elements, the others `fill`.
template <typename T>
FA_SIMD vf load_part(const T* p, int64_t n, float fill) {
  float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = i < n ? to_float(p[i]) : fill;
  return load(lane);
}
template <typename T>
FA_SIMD void store_part(T* p, vf v, int64_t n) {
  float lane[kLanes];
  store(lane, v);
  for (int64_t i = 0; i < n; ++i) from_float(p + i, lane[i]);
}

FA_SIMD vf max(vf a, vf b) { return a > b ? a : b; }  // b when a is NaN
FA_SIMD float sum(vf v) {                             // a fixed tree
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  return lane[0];
}
FA_SIMD float max(vf v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  return lane[0];
}

}  // namespace fa::FA_ISA
