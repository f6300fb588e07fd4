// rope: reads and writes a head's row once, 8 bytes an element in fp32; torch's six operations move some 44.
// The gradient is the transposed map: the two halves of sin change places and sign.
#include "rope.h"

#include "simd.h"

namespace fa::FA_ISA {
namespace {

// One half: out = x c + other s. Small heads are all tail.
template <typename T>
FA_SIMD void half(const T* x, const T* other, const T* c, const T* s, float sign, T* out, int64_t dim) {
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(out + i, load(x + i) * load(c + i) + load(other + i) * (load(s + i) * sign));
  for (; i < dim; ++i) from_float(out + i, to_float(x[i]) * to_float(c[i]) + to_float(other[i]) * (to_float(s[i]) * sign));
}

template <typename T>
void rotate(const Rope<T>& of) {
  const int64_t tokens = of.batch * of.length, half_dim = of.dim / 2;
#pragma omp parallel for schedule(static) if (tokens * of.heads * of.dim > 32768)
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t b = token / of.length, t = token % of.length;
    const T* cos = of.cos + b * of.cos_stride + t * of.dim;
    const T* sin = of.sin + b * of.cos_stride + t * of.dim;
    const T* first = of.transposed ? sin + half_dim : sin;
    const T* second = of.transposed ? sin : sin + half_dim;
    const float sign = of.transposed ? 1.0f : -1.0f;
    for (int64_t head = 0; head < of.heads; ++head) {
      const T* x = of.x + b * of.x_stride[0] + head * of.x_stride[1] + t * of.x_stride[2];
      T* out = of.out + b * of.out_stride[0] + head * of.out_stride[1] + t * of.out_stride[2];
      half(x, x + half_dim, cos, first, sign, out, half_dim);
      half(x + half_dim, x, cos + half_dim, second, -sign, out + half_dim, half_dim);
    }
  }
}

}  // namespace

void rope(const Rope<float>& of) { rotate(of); }
void rope(const Rope<uint16_t>& of) { rotate(of); }

}  // namespace fa::FA_ISA
