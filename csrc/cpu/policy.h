// Per-token log-probs → policy-gradient loss, its gradient and metrics, in one parallel region.
#pragma once
#include <cstdint>

#include "../math/policy.h"
#include "isa.h"

namespace fa {

// The order of the sums; fastalign/ops/policy.py names them alike.
enum PolicySum { kLoss, kClipLow, kClipHigh, kKl, kRatio, kApproxKl, kEntropy, kCorrection, kCorrectionClipped, kNumPolicySums };

template <typename T>
struct PolicyTokens {
  int64_t num_tokens;
  const T* logp;          // all [N]
  const T* old_logp;
  const T* advantages;
  const T* weights;
  const T* ref_logp;      // null: no KL
  const T* sampler_logp;  // null: no correction
  const T* entropy;       // null: no entropy
  const int32_t* cu_targets;  // [B+1], read when a ratio or a correction is a sequence's
  int64_t num_sequences;
  math::Policy<T> options;
  T* grad;       // [N] d loss / d logp
  double* sums;  // [kNumPolicySums]
};

}  // namespace fa

FA_DECLARE(void policy(const PolicyTokens<float>& tokens); void policy(const PolicyTokens<double>& tokens);)
