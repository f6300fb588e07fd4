// swiglu: reads gate and up once and writes the product, 12 bytes an element in fp32; backward reads three and writes two, 20 bytes.
// Torch reads and writes 20 forward, 44 backward, and keeps silu(gate) beside the two. An element's bits are its own: the end of a
// run goes through the same vectors.
#include "swiglu.h"

#include "../math/swiglu.h"
#include "simd.h"

namespace fa::FA_ISA {
namespace {

constexpr int64_t kBlock = 8192;  // elements a task

template <typename Run>
void each_vector(int64_t size, const Run& run) {
#pragma omp parallel for schedule(static) if (size > 4 * kBlock)
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = begin + kBlock < size ? begin + kBlock : size;
    for (int64_t i = begin; i < end; i += kLanes) run(i, end - i);
  }
}

template <typename T>
void forward(const Swiglu<T>& of, T* out) {
  each_vector(of.size, [&](int64_t i, int64_t left) {
    if (left >= kLanes) {
      store(out + i, math::swiglu<vu>(load(of.gate + i), load(of.up + i)));
    } else {
      store_part(out + i, math::swiglu<vu>(load_part(of.gate + i, left, 0.0f), load_part(of.up + i, left, 0.0f)), left);
    }
  });
}

template <typename T>
void backward(const Swiglu<T>& of, const SwigluGrads<T>& to) {
  each_vector(of.size, [&](int64_t i, int64_t left) {
    const bool whole = left >= kLanes;
    vf gate = whole ? load(of.gate + i) : load_part(of.gate + i, left, 0.0f);
    vf up = whole ? load(of.up + i) : load_part(of.up + i, left, 0.0f);
    math::swiglu_backward<vu>(whole ? load(to.grad + i) : load_part(to.grad + i, left, 0.0f), gate, up);
    if (whole) {
      store(to.gate + i, gate);
      store(to.up + i, up);
    } else {
      store_part(to.gate + i, gate, left);
      store_part(to.up + i, up, left);
    }
  });
}

}  // namespace

void swiglu(const Swiglu<float>& of, float* out) { forward(of, out); }
void swiglu(const Swiglu<uint16_t>& of, uint16_t* out) { forward(of, out); }
void swiglu_backward(const Swiglu<float>& of, const SwigluGrads<float>& to) { backward(of, to); }
void swiglu_backward(const Swiglu<uint16_t>& of, const SwigluGrads<uint16_t>& to) { backward(of, to); }

}  // namespace fa::FA_ISA
