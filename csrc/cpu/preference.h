// Packed per-token log-probs -> sums over sequences -> losses of pairs or of single completions, and the slopes of the sums.
#pragma once
#include <cstdint>

#include "../math/preference.h"
#include "isa.h"

namespace fa {

template <typename T>
struct Sequences {
  const T* logp;               // [N]
  const T* ref_logp;           // [N], [S] sums, or null: no reference
  bool ref_per_token;
  const int32_t* cu_targets;   // [S+1], from 0 to N
};

// Sequences 2i and 2i+1 are the chosen and the rejected completion of pair i.
template <typename T>
struct Pairs {
  Sequences<T> sequences;
  int64_t num_pairs, num_tokens;
  const T* margin;  // [B] or null
  const T* weight;  // [B] or null
  double tail;      // what tokens past the length of the pair's shorter completion count (1: all alike)
  math::Formula formula;
  T* losses;   // [B]
  T* metrics;  // [6, B]: rewards of chosen and rejected, their margin, whether it is > 0, log-probs of chosen and rejected
  T* slopes;   // [2B] dloss / dsum, the weight included
};

template <typename T>
struct Singles {
  Sequences<T> sequences;
  int64_t num_sequences, num_tokens;
  const bool* labels;  // [B] desirable?
  const T* weight;     // [B] or null
  math::SingleFormula formula;
  T* losses;   // [B]
  T* metrics;  // [2, B]: rewards, log-probs
  T* slopes;   // [B]
};

// The gradient of the tokens: upstream of the unit * slope of the sequence, * tail past the shorter completion.
template <typename T>
struct Spread {
  const T* upstream;  // one a unit
  int64_t upstream_stride;
  const T* slopes;            // [S]
  const int32_t* cu_targets;  // [S+1]
  int64_t num_sequences, unit, num_tokens;  // unit: sequences a unit, 2 for pairs
  double tail;
  T* gradient;  // [N]
};

}  // namespace fa

FA_DECLARE(void preference_pairs(const Pairs<float>& pairs); void preference_pairs(const Pairs<double>& pairs);
           void preference_singles(const Singles<float>& singles); void preference_singles(const Singles<double>& singles);
           void preference_spread(const Spread<float>& spread); void preference_spread(const Spread<double>& spread);)
