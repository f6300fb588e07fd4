// swiglu: reads gate and up once and writes the product, 12 bytes an element in fp32; backward reads three and writes two, 20 bytes.
// Torch reads and writes 20 forward, 44 backward, and keeps silu(gate) beside the two. An element's bits are its own: the end of a
// run goes through the same vectors.
#include "swiglu.h"

#include "../math/swiglu.h"
#include "elementwise.h"

namespace fa::FA_ISA {
namespace {

template <typename T>
void forward(const Swiglu<T>& of, T* out) {
  each_vector_of_all(of.size, [&](int64_t i, int64_t n) {
    store_some(out + i, math::swiglu<vu>(load_some(of.gate + i, n), load_some(of.up + i, n)), n);
  });
}

template <typename T>
void backward(const Swiglu<T>& of, const SwigluGrads<T>& to) {
  each_vector_of_all(of.size, [&](int64_t i, int64_t n) {
    vf gate = load_some(of.gate + i, n), up = load_some(of.up + i, n);
    math::swiglu_backward<vu>(load_some(to.grad + i, n), gate, up);
    store_some(to.gate + i, gate, n);
    store_some(to.up + i, up, n);
  });
}

}  // namespace

void swiglu(const Swiglu<float>& of, float* out) { forward(of, out); }
void swiglu(const Swiglu<uint16_t>& of, uint16_t* out) { forward(of, out); }
void swiglu_backward(const Swiglu<float>& of, const SwigluGrads<float>& to) { backward(of, to); }
void swiglu_backward(const Swiglu<uint16_t>& of, const SwigluGrads<uint16_t>& to) { backward(of, to); }

}  // namespace fa::FA_ISA
