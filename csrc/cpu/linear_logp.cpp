// logp_rows: one read of the row from memory. Blocks of 16 KiB stay in L1: their maximum first, then sum e^(z-m) and, for the entropy,
// sum (z-m) e^(z-m); blocks are merged in double. grad_rows: one read and one write.
#include "linear_logp.h"

#include <cmath>
#include <cstring>

#include "../math/softmax.h"
#include "simd.h"

namespace fa::FA_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // elements
constexpr int kChains = 4;        // independent accumulators hide the latency of fma

template <typename T>
float block_max(const T* x, int64_t n) {
  const vf lowest = splat(-INFINITY);
  vf m[kChains] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) m[c] = max(load(x + i + c * kLanes), m[c]);
  for (; i + kLanes <= n; i += kLanes) m[0] = max(load(x + i), m[0]);
  if (i < n) m[0] = max(load_part(x + i, n - i, -INFINITY), m[0]);
  return max(max(max(m[0], m[1]), max(m[2], m[3])));
}

struct Soften {
  float softcap, inv_softcap, inv_temperature;
};

template <bool kSoftcap, bool kEntropy>
FA_SIMD void accumulate(vf x, const Soften& s, float m, vf& sum, vf& weighted) {
  const vf down = math::soften<vu, vf>(x, kSoftcap ? s.softcap : 0.0f, s.inv_softcap, s.inv_temperature) - m;
  const vf e = math::exp<vu, vf>(down);
  sum += e;
  if (kEntropy) weighted += (down < math::kFloor ? splat(math::kFloor) : down) * e;
}

template <bool kSoftcap, bool kEntropy, typename T>
math::Online<double> block_sums(const T* x, int64_t n, const Soften& s, float m) {
  vf sums[kChains] = {}, weights[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kLanes <= n; i += kChains * kLanes)
    for (int c = 0; c < kChains; ++c) accumulate<kSoftcap, kEntropy>(load(x + i + c * kLanes), s, m, sums[c], weights[c]);
  for (; i + kLanes <= n; i += kLanes) accumulate<kSoftcap, kEntropy>(load(x + i), s, m, sums[0], weights[0]);
  math::Online<double> out;
  if (i < n) {
    // The filler must vanish after the soft-cap too, which lifts -inf to -softcap: mask the lanes instead.
    vf sum{}, weighted{};
    accumulate<kSoftcap, kEntropy>(load_part(x + i, n - i, -INFINITY), s, m, sum, weighted);
    float lane[kLanes], lane_weighted[kLanes];
    store(lane, sum);
    store(lane_weighted, weighted);
    for (int64_t k = 0; k < n - i; ++k) {
      out.sum += lane[k];
      out.weighted += lane_weighted[k];
    }
  }
  out.max = m;
  out.sum += sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
  if (kEntropy) out.weighted += sum((weights[0] + weights[1]) + (weights[2] + weights[3]));
  return out;
}

template <bool kSoftcap, bool kEntropy, typename T>
void logp_row(const LogpRows<T>& rows, const Soften& s, int64_t row) {
  const T* x = rows.logits + row * rows.row_stride;
  math::Online<double> online;
  float best = -INFINITY;
  int64_t best_block = 0;
  for (int64_t begin = 0; begin < rows.vocab; begin += kBlock) {
    const int64_t n = rows.vocab - begin < kBlock ? rows.vocab - begin : kBlock;
    const float raw = block_max(x + begin, n);
    if (raw > best) best = raw, best_block = begin;
    const float m = math::soften<uint32_t, float>(raw, s.softcap, s.inv_softcap, s.inv_temperature);
    // A block of nothing but -inf has no maximum to subtract; its terms are 0 around any finite one.
    online = math::merge(online, block_sums<kSoftcap, kEntropy>(x + begin, n, s, m == -INFINITY ? 0.0f : m));
  }
  const int64_t target = rows.targets[row];
  const float z = math::soften<uint32_t, float>(to_float(x[target]), s.softcap, s.inv_softcap, s.inv_temperature);
  const double log_sum = math::log_sum(online);
  rows.lse[row] = static_cast<float>(online.max + log_sum);
  // Not z - lse: at logits of 1e4 lse in fp32 is known to 5e-4 only.
  rows.logp[row] = static_cast<float>((static_cast<double>(z) - online.max) - log_sum);
  if (kEntropy) rows.entropy[row] = static_cast<float>(math::entropy(online));
  int64_t first = best_block;  // the first arg-max is in the first block that reached the maximum
  while (first < rows.vocab && !(to_float(x[first]) == best)) ++first;
  rows.correct[row] = first == target && online.sum == online.sum;
}

template <bool kSoftcap, bool kEntropy, typename T>
void logp_all(const LogpRows<T>& rows) {
  const Soften s{rows.softcap, kSoftcap ? 1.0f / rows.softcap : 0.0f, rows.inv_temperature};
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows.num_rows; ++row) logp_row<kSoftcap, kEntropy>(rows, s, row);
}

template <typename T>
void logp_dispatch(const LogpRows<T>& rows) {
  if (rows.softcap > 0.0f)
    rows.entropy ? logp_all<true, true>(rows) : logp_all<true, false>(rows);
  else
    rows.entropy ? logp_all<false, true>(rows) : logp_all<false, false>(rows);
}

// What is the same for every element of a row.
struct RowGrad {
  Soften soften;
  float lse, g_logp, g_entropy, entropy;
};

template <bool kSoftcap, bool kEntropy>
FA_SIMD vf grad_lanes(vf x, const RowGrad& g) {
  vf slope = splat(g.soften.inv_temperature);
  if (kSoftcap) {
    const vf t = math::tanh<vu, vf>(x * g.soften.inv_softcap);
    x = t * g.soften.softcap;
    slope = slope * (1.0f - t * t);
  }
  const vf logp = x * g.soften.inv_temperature - g.lse;
  if (!kEntropy) return math::exp<vu, vf>(logp) * (-g.g_logp * slope);
  return math::grad_other<vu, vf>(logp, g.g_logp, g.g_entropy, g.entropy) * slope;
}

// At the target 1 - p is taken as -expm1(logp): what is left when p is near 1.
float grad_target(float x, const RowGrad& g) {
  float slope = g.soften.inv_temperature;
  if (g.soften.softcap > 0.0f) {
    const float t = math::tanh(x * g.soften.inv_softcap);
    x = t * g.soften.softcap;
    slope *= 1.0f - t * t;
  }
  const float logp = x * g.soften.inv_temperature - g.lse;
  const float from_entropy = math::grad_other<uint32_t, float>(logp, 0.0f, g.g_entropy, g.entropy);
  return (from_entropy - g.g_logp * std::expm1(logp)) * slope;
}

template <bool kSoftcap, bool kEntropy, typename T, typename U>
void grad_row(const GradRows<T, U>& rows, const Soften& s, int64_t row) {
  const T* x = rows.logits + row * rows.row_stride;
  U* out = rows.out + row * rows.out_stride;
  const RowGrad g{s, rows.lse[row], rows.g_logp[row], kEntropy ? rows.g_entropy[row] : 0.0f, kEntropy ? rows.entropy[row] : 0.0f};
  if (g.g_logp == 0.0f && g.g_entropy == 0.0f) {
    std::memset(out, 0, sizeof(U) * rows.vocab);
    return;
  }
  const float at_target = grad_target(to_float(x[rows.targets[row]]), g);
  int64_t i = 0;
  for (; i + kLanes <= rows.vocab; i += kLanes) store(out + i, grad_lanes<kSoftcap, kEntropy>(load(x + i), g));
  if (i < rows.vocab) store_part(out + i, grad_lanes<kSoftcap, kEntropy>(load_part(x + i, rows.vocab - i, 0.0f), g), rows.vocab - i);
  from_float(out + rows.targets[row], at_target);
}

template <bool kSoftcap, bool kEntropy, typename T, typename U>
void grad_all(const GradRows<T, U>& rows) {
  const Soften s{rows.softcap, kSoftcap ? 1.0f / rows.softcap : 0.0f, rows.inv_temperature};
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows.num_rows; ++row) grad_row<kSoftcap, kEntropy>(rows, s, row);
}

template <typename T, typename U>
void grad_dispatch(const GradRows<T, U>& rows) {
  if (rows.softcap > 0.0f)
    rows.g_entropy ? grad_all<true, true>(rows) : grad_all<true, false>(rows);
  else
    rows.g_entropy ? grad_all<false, true>(rows) : grad_all<false, false>(rows);
}

}  // namespace

void logp_rows(const LogpRows<float>& rows) { logp_dispatch(rows); }
void logp_rows(const LogpRows<uint16_t>& rows) { logp_dispatch(rows); }
void grad_rows(const GradRows<float>& rows) { grad_dispatch(rows); }
void grad_rows(const GradRows<uint16_t>& rows) { grad_dispatch(rows); }
void grad_rows(const GradRows<float, uint16_t>& rows) { grad_dispatch(rows); }

}  // namespace fa::FA_ISA
