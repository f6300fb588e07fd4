// kl_rows: a thread takes a row through all its passes while it lies in the cache: both sums of e^x, the divergence, the gradient in
// place of the student's logits. The divergence's pass leaves the gradient's dearest part in a row of fp32 a thread.
// Sums are fp32 within a block, double across blocks.
#include "linear_kl.h"

#include <cmath>
#include <cstring>
#include <memory>

#include "../math/softmax.h"
#include "simd.h"

namespace fa::FA_ISA {
namespace {

using math::Divergence;

constexpr int64_t kBlock = 4096;  // elements
constexpr int kChains = 4;        // independent accumulators hide the latency of fma

template <typename T>
float block_max(const T* x, int64_t n) {
  vf m[kChains];
  for (vf& chain : m) chain = splat(-INFINITY);
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) m[c] = max(load(x + i + c * kLanes), m[c]);
  for (; i < n; i += kLanes) m[0] = max(n - i < kLanes ? load_part(x + i, n - i, -INFINITY) : load(x + i), m[0]);
  return max(max(max(m[0], m[1]), max(m[2], m[3])));
}

template <typename T>
float block_sum(const T* x, int64_t n, float m, float inv_temperature) {
  vf sums[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) sums[c] += math::exp<vu, vf>((load(x + i + c * kLanes) - m) * inv_temperature);
  for (; i < n; i += kLanes) {
    const vf v = n - i < kLanes ? load_part(x + i, n - i, -INFINITY) : load(x + i);
    sums[0] += math::exp<vu, vf>((v - m) * inv_temperature);
  }
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// out[0]: the raw maximum, out[1]: the sum of e^((x - maximum) / temperature).
template <typename T>
void sum_of_row(const T* x, int64_t vocab, float inv_temperature, float* out) {
  math::Online<double> online;
  float best = -INFINITY;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
    const float raw = block_max(x + begin, n);
    const float m = raw == -INFINITY ? 0.0f : raw;  // a block of nothing but -inf: its terms are 0 around any finite number
    math::Online<double> block;
    block.max = static_cast<double>(m) * inv_temperature;
    block.sum = block_sum(x + begin, n, m, inv_temperature);
    online = math::merge(online, block);
    best = raw > best ? raw : best;
  }
  out[0] = best;
  out[1] = static_cast<float>(online.sum);
}

// raw: the part of the gradient that is known before the center is, kept for gradient_of_row. Written even where no gradient is
// wanted: it is cheap, and one instantiation gives a row the same bits with and without its gradient.
template <Divergence kKind, typename S, typename T>
void divergence_of_row(const S* student, const T* teacher, int64_t vocab, const math::RowPair& pair, float* value_out, float* center_out,
                       float* raw) {
  double value = 0.0, center = 0.0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = vocab - begin < kBlock ? vocab : begin + kBlock;
    vf values[2] = {}, centers[2] = {};
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes)
      for (int c = 0; c < 2; ++c) {
        const int64_t at = i + c * kLanes;
        const auto e = math::element<vu, vf>(load(student + at), load(teacher + at), pair);
        store(raw + at, math::add_element<kKind, vu>(e, pair, values[c], centers[c]));
      }
    for (; i < end; i += kLanes) {  // beyond the row both probabilities are 0 and add nothing
      const int64_t n = end - i < kLanes ? end - i : kLanes;
      const auto e = math::element<vu, vf>(load_part(student + i, n, -INFINITY), load_part(teacher + i, n, -INFINITY), pair);
      store_part(raw + i, math::add_element<kKind, vu>(e, pair, values[0], centers[0]), n);
    }
    value += sum(values[0] + values[1]);
    center += sum(centers[0] + centers[1]);
  }
  *value_out = static_cast<float>(value);
  *center_out = static_cast<float>(center);
}

template <Divergence kKind, bool kKept>
FA_SIMD vf slope_lanes(vf x, vf y, const math::RowPair& pair, float center, vf raw) {
  const auto e = math::element<vu, vf>(x, y, pair);  // with the raw slope kept, only the student's probability is taken from it
  return math::slope<kKind>(e.student, kKept ? raw : math::raw_slope<kKind, vu>(e, pair), pair, center);
}

template <Divergence kKind, bool kKept, typename S, typename T>
void gradient_of_row(S* student, const T* teacher, int64_t vocab, const math::RowPair& pair, float center, float g, const float* raw) {
  if (g == 0.0f) {
    std::memset(student, 0, sizeof(S) * vocab);
    return;
  }
  const float scale = g * pair.inv_temperature;
  int64_t i = 0;
  for (; i + kLanes <= vocab; i += kLanes) {
    const vf kept = kKept ? load(raw + i) : vf{};
    store(student + i, slope_lanes<kKind, kKept>(load(student + i), load(teacher + i), pair, center, kept) * scale);
  }
  if (const int64_t n = vocab - i) {
    const vf x = load_part(student + i, n, -INFINITY), y = load_part(teacher + i, n, -INFINITY);
    const vf kept = kKept ? load_part(raw + i, n, 0.0f) : vf{};
    store_part(student + i, slope_lanes<kKind, kKept>(x, y, pair, center, kept) * scale, n);
  }
}

template <Divergence kKind, typename S, typename T>
void one_row(const KlRows<S, T>& rows, int64_t row, float* raw) {
  S* student = rows.student + row * rows.student_stride;
  const T* teacher = rows.teacher + row * rows.teacher_stride;
  float* state = rows.state + row * kKlState;
  if (!rows.divergence) {
    const math::RowPair pair = math::row_pair(rows.inv_temperature, state, rows.beta);
    return gradient_of_row<kKind, false>(student, teacher, rows.vocab, pair, state[4], rows.g[row], nullptr);
  }
  sum_of_row(student, rows.vocab, rows.inv_temperature, state);
  sum_of_row(teacher, rows.vocab, rows.inv_temperature, state + 2);
  const math::RowPair pair = math::row_pair(rows.inv_temperature, state, rows.beta);
  divergence_of_row<kKind>(student, teacher, rows.vocab, pair, rows.divergence + row, state + 4, raw);
  if (rows.g) gradient_of_row<kKind, true>(student, teacher, rows.vocab, pair, state[4], rows.g[row], raw);
}

template <Divergence kKind, typename S, typename T>
void all_rows(const KlRows<S, T>& rows) {
#pragma omp parallel
  {
    const std::unique_ptr<float[]> raw(rows.divergence ? new float[rows.vocab] : nullptr);  // [V] a thread
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows.num_rows; ++row) one_row<kKind>(rows, row, raw.get());
  }
}

template <typename S, typename T>
void dispatch(const KlRows<S, T>& rows) {
  switch (rows.kind) {
    case Divergence::forward_kl: return all_rows<Divergence::forward_kl>(rows);
    case Divergence::reverse_kl: return all_rows<Divergence::reverse_kl>(rows);
    case Divergence::jsd: return all_rows<Divergence::jsd>(rows);
  }
}

}  // namespace

void kl_rows(const KlRows<float, float>& rows) { dispatch(rows); }
void kl_rows(const KlRows<float, uint16_t>& rows) { dispatch(rows); }
void kl_rows(const KlRows<uint16_t, float>& rows) { dispatch(rows); }
void kl_rows(const KlRows<uint16_t, uint16_t>& rows) { dispatch(rows); }

}  // namespace fa::FA_ISA
