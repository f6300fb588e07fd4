// policy: 16 bytes read a token (24 with KL and correction), 4 written. Tokens are cut into runs: even blocks, or the sequences where a
// ratio is a sequence's. A run's sums are double and go to its own place, the runs' sums are added in order: the result does not depend
// on the number of threads. Inside a run the terms are fp32 lanes (doubles for fp64 inputs).
#include "policy.h"

#include <vector>

#include "simd.h"

namespace fa::FA_ISA {
namespace {

constexpr int64_t kBlock = 2048;  // tokens a run

typedef double vd __attribute__((vector_size(kLanes * 4)));
typedef float vhalf __attribute__((vector_size(kLanes * 2)));

// A double for every lane of a vf.
struct WideLanes {
  vd low, high;
  void operator+=(const WideLanes& other) {
    low += other.low;
    high += other.high;
  }
};

// How a dtype is computed: 16 floats (8, 4) at a time, or one double.
struct Floats {
  using F = vf;
  using U = vu;
  using Wide = WideLanes;
  static constexpr int width = kLanes;
};
struct Doubles {
  using F = double;
  using U = uint64_t;
  using Wide = double;
  static constexpr int width = 1;
};
template <typename T>
using LanesOf = std::conditional_t<std::is_same_v<T, float>, Floats, Doubles>;

FA_SIMD WideLanes widen(vf x) {
  vhalf half[2];
  std::memcpy(half, &x, sizeof x);
  return {__builtin_convertvector(half[0], vd), __builtin_convertvector(half[1], vd)};
}
FA_SIMD double widen(double x) { return x; }
FA_SIMD double total(const WideLanes& v) {  // a fixed order
  double lane[kLanes], sum = 0.0;
  std::memcpy(lane, &v, sizeof v);
  for (int i = 0; i < kLanes; ++i) sum += lane[i];
  return sum;
}
FA_SIMD double total(double v) { return v; }

// The lanes of tokens [i, i + n): beyond n they are zero.
FA_SIMD vf read(const float* p, int64_t n) { return n == kLanes ? load(p) : load_part(p, n, 0.0f); }
FA_SIMD double read(const double* p, int64_t) { return *p; }
FA_SIMD void write(float* p, vf v, int64_t n) { n == kLanes ? store(p, v) : store_part(p, v, n); }
FA_SIMD void write(double* p, double v, int64_t) { *p = v; }
FA_SIMD vf live_lanes(int64_t n, vf) {
  float lane[kLanes];
  for (int i = 0; i < kLanes; ++i) lane[i] = i < n ? 1.0f : 0.0f;
  return load(lane);
}
FA_SIMD double live_lanes(int64_t, double) { return 1.0; }

template <typename T>
struct Sums {
  typename LanesOf<T>::Wide loss{}, clip_low{}, clip_high{}, kl{}, ratio{}, approx_kl{}, entropy{}, correction{}, correction_clipped{};
  typename LanesOf<T>::Wide pull{};  // of weight * correction * slope, where the ratio is the sequence's
};

// What a sequence's tokens share.
struct Shared {
  double log_ratio = 0.0;       // mean of the contributions
  double log_correction = 0.0;  // sum of old_logp - sampler_logp
};

template <typename T>
FA_SIMD auto read_advantage(const PolicyTokens<T>& t, math::Advantage rule, int64_t i, int64_t n) {
  return math::advantage_of(rule, read(t.advantages + i, n));
}
template <typename T>
FA_SIMD auto read_log_ratio(const PolicyTokens<T>& t, int64_t i, int64_t n) {
  return read(t.logp + i, n) - read(t.old_logp + i, n);
}

template <typename T>
Shared measure(const PolicyTokens<T>& t, int64_t begin, int64_t end) {
  using L = LanesOf<T>;
  const math::Policy<T> p = t.options;
  const bool ratio = p.has_sequence_ratio(), corrected = t.sampler_logp && p.has_sequence_correction();
  if ((!ratio && !corrected) || begin == end) return {};
  typename L::Wide log_ratios{}, corrections{};
  for (int64_t i = begin; i < end; i += L::width) {
    const int64_t n = end - i < L::width ? end - i : L::width;
    if (ratio) log_ratios += widen(math::contribution(p, read_log_ratio(t, i, n), read_advantage(t, p.advantage, i, n)).value);
    if (corrected) corrections += widen(read(t.old_logp + i, n) - read(t.sampler_logp + i, n));
  }
  return {total(log_ratios) / static_cast<double>(end - begin), total(corrections)};
}

// Loss and metrics of up to `width` tokens; their gradient but for what comes through a sequence's ratio.
template <typename T>
FA_SIMD void step(const PolicyTokens<T>& t, const math::Policy<T>& p, const Shared& shared, int64_t i, int64_t n, Sums<T>& sums) {
  using F = typename LanesOf<T>::F;
  using U = typename LanesOf<T>::U;
  const F zero = F{}, live = n == LanesOf<T>::width ? zero + 1.0f : live_lanes(n, zero);
  const F weight = read(t.weights + i, n), adv = read_advantage(t, p.advantage, i, n);
  const F logp = read(t.logp + i, n), old = read(t.old_logp + i, n), own = logp - old, near = math::saturated(own);
  const bool by_sequence = p.has_sequence_ratio();
  const F log_ratio = by_sequence ? zero + static_cast<T>(shared.log_ratio) : own;
  const F ratio = math::exp_of<U, F>(math::saturated(log_ratio));
  math::Term<F> term = math::surrogate<U>(p, logp, log_ratio, ratio, adv);
  const F seen = p.loss == math::PolicyLoss::gmpo ? math::exp_of<U, F>(near) : ratio;
  sums.clip_low += widen(((seen < p.low) & (adv < zero)) ? live : zero);
  sums.clip_high += widen(((seen > p.high) & (adv > zero)) ? live : zero);
  sums.ratio += widen(seen * live);
  sums.approx_kl += widen(near * near * static_cast<T>(0.5));
  if (t.sampler_logp && p.correction != math::Correction::none) {
    const F gap = p.has_sequence_correction() ? zero + static_cast<T>(shared.log_correction) : old - read(t.sampler_logp + i, n);
    const math::Term<F> c = math::correction<U>(p, gap);
    sums.correction += widen(c.value * live);
    sums.correction_clipped += widen(c.slope * live);
    term = {c.value == zero ? zero : c.value * term.value, c.value == zero ? zero : c.value * term.slope};
  }
  F loss = term.value, slope = term.slope;
  if (by_sequence && p.loss != math::PolicyLoss::gspo_token) {
    sums.pull += widen(weight == zero ? zero : weight * slope);
    slope = zero;
  }
  if (t.ref_logp) {
    const math::Term<F> kl = math::divergence<U>(p.kl, logp, read(t.ref_logp + i, n));
    sums.kl += widen(kl.value);
    if (p.kl_coef != 0) {
      loss = loss + kl.value * p.kl_coef;
      slope = slope + kl.slope * p.kl_coef;
    }
  }
  if (t.entropy) {
    const F entropy = read(t.entropy + i, n);
    sums.entropy += widen(entropy);
    if (p.entropy_coef != 0) loss = loss - entropy * p.entropy_coef;
  }
  sums.loss += widen(weight == zero ? zero : weight * loss);
  write(t.grad + i, weight == zero ? zero : weight * slope, n);
}

// The gradient through the sequence's ratio: the same share for every token that moves it.
template <typename T>
void spread(const PolicyTokens<T>& t, T share, int64_t begin, int64_t end) {
  using L = LanesOf<T>;
  const math::Policy<T> p = t.options;
  for (int64_t i = begin; i < end; i += L::width) {
    const int64_t n = end - i < L::width ? end - i : L::width;
    const auto moved = math::contribution(p, read_log_ratio(t, i, n), read_advantage(t, p.advantage, i, n)).slope;
    write(t.grad + i, read(t.grad + i, n) + moved * share, n);
  }
}

template <typename T>
void run(const PolicyTokens<T>& tokens, int64_t begin, int64_t end, double* out) {
  constexpr int64_t width = LanesOf<T>::width;
  const PolicyTokens<T> t = tokens;  // copies, which no store of a gradient can alias
  const math::Policy<T> p = t.options;
  const Shared shared = measure(t, begin, end);
  Sums<T> sums;
  int64_t i = begin;
  for (; i + width <= end; i += width) step(t, p, shared, i, width, sums);
  if (i < end) step(t, p, shared, i, end - i, sums);
  const T share = begin < end ? static_cast<T>(total(sums.pull) / static_cast<double>(end - begin)) : T(0);
  if (share != 0) spread(t, share, begin, end);
  out[kLoss] = total(sums.loss);
  out[kClipLow] = total(sums.clip_low);
  out[kClipHigh] = total(sums.clip_high);
  out[kKl] = total(sums.kl);
  out[kRatio] = total(sums.ratio);
  out[kApproxKl] = total(sums.approx_kl);
  out[kEntropy] = total(sums.entropy);
  out[kCorrection] = total(sums.correction);
  out[kCorrectionClipped] = total(sums.correction_clipped);
}

template <typename T>
void policy_all(const PolicyTokens<T>& t) {
  const bool by_sequence = t.options.has_sequence_ratio() || (t.sampler_logp && t.options.has_sequence_correction());
  const int64_t runs = by_sequence ? t.num_sequences : (t.num_tokens + kBlock - 1) / kBlock;
  std::vector<double> found(runs * kNumPolicySums);
#pragma omp parallel for schedule(dynamic, 1) if (t.num_tokens > kBlock)
  for (int64_t r = 0; r < runs; ++r) {
    const int64_t begin = by_sequence ? t.cu_targets[r] : r * kBlock;
    const int64_t end = by_sequence ? t.cu_targets[r + 1] : begin + kBlock < t.num_tokens ? begin + kBlock : t.num_tokens;
    run(t, begin, end, found.data() + r * kNumPolicySums);
  }
  for (int k = 0; k < kNumPolicySums; ++k) t.sums[k] = 0.0;
  for (int64_t r = 0; r < runs; ++r)
    for (int k = 0; k < kNumPolicySums; ++k) t.sums[k] += found[r * kNumPolicySums + k];
}

}  // namespace

void policy(const PolicyTokens<float>& tokens) { policy_all(tokens); }
void policy(const PolicyTokens<double>& tokens) { policy_all(tokens); }

}  // namespace fa::FA_ISA
