// rms_norm: a row is summed and scaled while it is in the first-level cache: 8 bytes an element forward, 12 backward, in fp32.
// Torch's five operations move 36 forward. Backward computes the row's scale again, so nothing but x is kept.
//   r = 1 / rms(x);  y = x r w;  dx = r (w dy - x r^2 mean(w dy x));  dw = sum over rows of dy x r
// A row's bits are its own. dw is summed in blocks of kRmsNormRows rows, in order, whatever the threads.
#include "rms_norm.h"

#include <cmath>

#include "elementwise.h"

namespace fa::FA_ISA {
namespace {

constexpr int64_t kAlone = 32768;  // elements that are not worth a second thread

template <typename T>
FA_SIMD float scale_of(const RmsNorm<T>& of, const T* x) {
  vf squares{};
  each_vector(0, of.width, [&](int64_t i, int64_t n) {
    const vf v = load_some(x + i, n);
    squares += v * v;
  });
  return 1.0f / std::sqrt(sum(squares) / static_cast<float>(of.width) + of.eps);
}

template <typename T>
void forward(const RmsNorm<T>& of, T* out) {
#pragma omp parallel for schedule(static) if (of.rows * of.width > kAlone)
  for (int64_t row = 0; row < of.rows; ++row) {
    const T* x = of.x + row * of.width;
    T* y = out + row * of.width;
    const float r = scale_of(of, x);
    each_vector(0, of.width, [&](int64_t i, int64_t n) { store_some(y + i, load_some(x + i, n) * r * load_some(of.weight + i, n), n); });
  }
}

// One row; dw is added to `partial` where that is not null. dx has a loop of its own: its bits are the same with and without dw.
template <typename T>
void backward_row(const RmsNorm<T>& of, const T* x, const T* grad, T* dx, float* partial) {
  vf squares{}, products{};
  each_vector(0, of.width, [&](int64_t i, int64_t n) {
    const vf v = load_some(x + i, n);
    squares += v * v;
    products += load_some(grad + i, n) * load_some(of.weight + i, n) * v;
  });
  const float mean = sum(squares) / static_cast<float>(of.width) + of.eps;
  const float r = 1.0f / std::sqrt(mean);
  const float along = sum(products) / static_cast<float>(of.width) / mean;
  each_vector(0, of.width, [&](int64_t i, int64_t n) {
    store_some(dx + i, (load_some(grad + i, n) * load_some(of.weight + i, n) - load_some(x + i, n) * along) * r, n);
  });
  if (!partial) return;
  each_vector(0, of.width, [&](int64_t i, int64_t n) {
    store_some(partial + i, load_some(partial + i, n) + load_some(grad + i, n) * load_some(x + i, n) * r, n);
  });
}

template <typename T>
void backward(const RmsNorm<T>& of, const RmsNormGrads<T>& to) {
  const int64_t blocks = (of.rows + kRmsNormRows - 1) / kRmsNormRows;
#pragma omp parallel for schedule(static) if (of.rows * of.width > kAlone)
  for (int64_t block = 0; block < blocks; ++block) {
    float* partial = to.weight ? to.partial + block * of.width : nullptr;
    for (int64_t i = 0; partial && i < of.width; ++i) partial[i] = 0.0f;
    const int64_t end = (block + 1) * kRmsNormRows < of.rows ? (block + 1) * kRmsNormRows : of.rows;
    for (int64_t row = block * kRmsNormRows; row < end; ++row)
      backward_row(of, of.x + row * of.width, to.grad + row * of.width, to.x + row * of.width, partial);
  }
  if (!to.weight) return;
  for (int64_t i = 0; i < of.width; ++i) to.weight[i] = 0.0f;
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < of.width; ++i) to.weight[i] += to.partial[block * of.width + i];
}

}  // namespace

void rms_norm(const RmsNorm<float>& of, float* out) { forward(of, out); }
void rms_norm(const RmsNorm<uint16_t>& of, uint16_t* out) { forward(of, out); }
void rms_norm_backward(const RmsNorm<float>& of, const RmsNormGrads<float>& to) { backward(of, to); }
void rms_norm_backward(const RmsNorm<uint16_t>& of, const RmsNormGrads<uint16_t>& to) { backward(of, to); }

}  // namespace fa::FA_ISA
