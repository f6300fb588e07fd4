// Elementwise steps of a decoder layer: each reads its operands once and writes once.
#include "decoder_layer.h"

#include "elementwise.h"

namespace fa::FA_ISA {
namespace {

FA_SIMD vf rounded(vf v, const float*) { return v; }
FA_SIMD vf rounded(vf v, const uint16_t*) {
  uint16_t lane[kLanes];
  store(lane, v);
  return load(lane);
}

template <typename T, typename S>
void add_all(const T* x, const S* part, int64_t size, T* out) {
  each_vector_of_all(size, [&](int64_t i, int64_t n) { store_some(out + i, load_some(x + i, n) + rounded(load_some(part + i, n), x), n); });
}

}  // namespace

void add(const float* x, const float* part, int64_t size, float* out) { add_all(x, part, size, out); }
void add(const uint16_t* x, const float* part, int64_t size, uint16_t* out) { add_all(x, part, size, out); }
void add(const uint16_t* x, const uint16_t* part, int64_t size, uint16_t* out) { add_all(x, part, size, out); }
void round_to(const float* x, int64_t size, uint16_t* out) {
  each_vector_of_all(size, [&](int64_t i, int64_t n) { store_some(out + i, load_some(x + i, n), n); });
}
void widen(const uint16_t* x, int64_t size, float* out) {
  each_vector_of_all(size, [&](int64_t i, int64_t n) { store_some(out + i, load_some(x + i, n), n); });
}

}  // namespace fa::FA_ISA
