// Elementwise steps of a decoder layer: each reads its operands once and writes once.
#include "decoder_layer.h"

#include "simd.h"

namespace fa::FA_ISA {
namespace {

constexpr int64_t kBlock = 8192;  // elements a task

// run(i, n) of every vector: its first element and how many are there.
template <typename Run>
void each_vector(int64_t size, const Run& run) {
#pragma omp parallel for schedule(static) if (size > 4 * kBlock)
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = begin + kBlock < size ? begin + kBlock : size;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) run(i, kLanes);
    if (i < end) run(i, end - i);
  }
}
template <typename T>
FA_SIMD vf load_some(const T* p, int64_t n) {
  return n == kLanes ? load(p) : load_part(p, n, 0.0f);
}
template <typename T>
FA_SIMD void store_some(T* p, vf v, int64_t n) {
  n == kLanes ? store(p, v) : store_part(p, v, n);
}

FA_SIMD vf rounded(vf v, const float*) { return v; }
FA_SIMD vf rounded(vf v, const uint16_t*) {
  uint16_t lane[kLanes];
  store(lane, v);
  return load(lane);
}

template <typename T, typename S>
void add_all(const T* x, const S* part, int64_t size, T* out) {
  each_vector(size, [&](int64_t i, int64_t n) { store_some(out + i, load_some(x + i, n) + rounded(load_some(part + i, n), x), n); });
}

}  // namespace

void add(const float* x, const float* part, int64_t size, float* out) { add_all(x, part, size, out); }
void add(const uint16_t* x, const float* part, int64_t size, uint16_t* out) { add_all(x, part, size, out); }
void add(const uint16_t* x, const uint16_t* part, int64_t size, uint16_t* out) { add_all(x, part, size, out); }
void round_to(const float* x, int64_t size, uint16_t* out) {
  each_vector(size, [&](int64_t i, int64_t n) { store_some(out + i, load_some(x + i, n), n); });
}
void widen(const uint16_t* x, int64_t size, float* out) {
  each_vector(size, [&](int64_t i, int64_t n) { store_some(out + i, load_some(x + i, n), n); });
}

}  // namespace fa::FA_ISA
