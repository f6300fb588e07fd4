// Backward scans over packed sequences. Sums run in double whatever the dtype.
#pragma once
#include <cstdint>

#include "isa.h"

namespace fa {

template <typename T>
struct GaeScan {
  const T* rewards;           // [T]
  const T* values;            // [T]
  const int32_t* cu_seqlens;  // [S+1]
  int64_t num_sequences;
  const bool* mask;     // [T] or null; false: a hole
  const T* bootstrap;   // [S] or null (0): the value after the last token
  const double* lams;   // [S] or null: lam for every sequence
  double lam, gamma;
  T* advantages;  // [T]
  T* returns;     // [T]
};

template <typename T>
struct DiscountedScan {
  const T* rewards;
  const int32_t* cu_seqlens;
  int64_t num_sequences;
  double gamma;
  T* returns;
};

// Discounted returns are advantages without values at lam 1.
template <typename T>
GaeScan<T> as_gae(const DiscountedScan<T>& scan) {
  return {scan.rewards, nullptr, scan.cu_seqlens, scan.num_sequences, nullptr, nullptr, nullptr, 1.0, scan.gamma, scan.returns, nullptr};
}

}  // namespace fa

FA_DECLARE(void gae(const GaeScan<float>& scan); void gae(const GaeScan<double>& scan);
           void discounted_returns(const DiscountedScan<float>& scan); void discounted_returns(const DiscountedScan<double>& scan);)
