// Preference losses: a sequence is summed in fp64 over eight interleaved lanes, always in that order, so neither threads nor the
// instruction set change a bit of it. 16 pairs of 512 tokens take a few microseconds; what is left is the call.
#include "preference.h"

#include <algorithm>

namespace fa::FA_ISA {
namespace {

constexpr int64_t kParallelTokens = 1 << 16;  // waking a thread costs more than what it would sum below this

template <typename T>
double sum(const T* x, int64_t begin, int64_t end) {
  constexpr int kLanes = 8;
  double lane[kLanes] = {};
  int64_t i = begin;
  for (; i + kLanes <= end; i += kLanes)
    for (int k = 0; k < kLanes; ++k) lane[k] += static_cast<double>(x[i + k]);
  for (int k = 0; i < end; ++i, ++k) lane[k] += static_cast<double>(x[i]);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int k = 0; k < width; ++k) lane[k] += lane[k + width];
  return lane[0];
}

template <typename T>
math::Sums sums(const Sequences<T>& s, int64_t sequence, int64_t head, double tail) {
  const int64_t begin = s.cu_targets[sequence], end = s.cu_targets[sequence + 1], cut = std::min(begin + head, end);
  auto both = [&](const T* x) { return tail == 1.0 ? sum(x, begin, end) : sum(x, begin, cut) + tail * sum(x, cut, end); };
  const double ref = !s.ref_logp ? 0.0 : s.ref_per_token ? both(s.ref_logp) : static_cast<double>(s.ref_logp[sequence]);
  return {both(s.logp), ref, end - begin};
}

template <typename T>
void pairs_all(const Pairs<T>& p) {
#pragma omp parallel for schedule(static) if (p.num_tokens >= kParallelTokens)
  for (int64_t pair = 0; pair < p.num_pairs; ++pair) {
    const int32_t* cu = p.sequences.cu_targets + 2 * pair;
    const int64_t head = std::min(cu[1] - cu[0], cu[2] - cu[1]);
    const math::Sums chosen = sums(p.sequences, 2 * pair, head, p.tail), rejected = sums(p.sequences, 2 * pair + 1, head, p.tail);
    const double margin = p.margin ? static_cast<double>(p.margin[pair]) : 0.0;
    const double weight = p.weight ? static_cast<double>(p.weight[pair]) : 1.0;
    const math::PairResult result = math::pair_of_sums(p.formula, chosen, rejected, margin, weight);
    math::store_pair(result, chosen, rejected, pair, p.num_pairs, p.losses, p.metrics, p.slopes);
  }
}

template <typename T>
void singles_all(const Singles<T>& p) {
#pragma omp parallel for schedule(static) if (p.num_tokens >= kParallelTokens)
  for (int64_t i = 0; i < p.num_sequences; ++i) {
    const math::Sums one = sums(p.sequences, i, 0, 1.0);
    const math::Scored result = math::single_loss(p.formula, one.logp - one.ref_logp, p.labels[i]);
    const double weight = p.weight ? static_cast<double>(p.weight[i]) : 1.0;
    math::store_single(result, one, weight, p.formula.beta, i, p.num_sequences, p.losses, p.metrics, p.slopes);
  }
}

template <typename T>
void spread_all(const Spread<T>& s) {
#pragma omp parallel for schedule(static) if (s.num_tokens >= kParallelTokens)
  for (int64_t i = 0; i < s.num_sequences; ++i) {
    const int64_t begin = s.cu_targets[i], end = s.cu_targets[i + 1];
    const int64_t other = s.unit == 2 ? i ^ 1 : i;
    const int64_t cut = std::min(begin + s.cu_targets[other + 1] - s.cu_targets[other], end);
    const double slope = static_cast<double>(s.upstream[i / s.unit * s.upstream_stride]) * static_cast<double>(s.slopes[i]);
    std::fill(s.gradient + begin, s.gradient + cut, static_cast<T>(slope));
    std::fill(s.gradient + cut, s.gradient + end, static_cast<T>(slope * s.tail));
  }
}

}  // namespace

void preference_pairs(const Pairs<float>& pairs) { pairs_all(pairs); }
void preference_pairs(const Pairs<double>& pairs) { pairs_all(pairs); }
void preference_singles(const Singles<float>& singles) { singles_all(singles); }
void preference_singles(const Singles<double>& singles) { singles_all(singles); }
void preference_spread(const Spread<float>& spread) { spread_all(spread); }
void preference_spread(const Spread<double>& spread) { spread_all(spread); }

}  // namespace fa::FA_ISA
