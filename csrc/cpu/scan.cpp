// GAE and discounted returns: one backward walk a sequence, sequences in parallel. 131,072 tokens take a fraction of a millisecond.
#include "scan.h"

#include "../math/affine.h"

namespace fa::FA_ISA {
namespace {

template <typename T>
void gae_sequence(const GaeScan<T>& scan, int64_t sequence) {
  double next_value = scan.bootstrap ? static_cast<double>(scan.bootstrap[sequence]) : 0.0;
  double advantage = 0.0;
  for (int64_t t = scan.cu_seqlens[sequence + 1] - 1; t >= scan.cu_seqlens[sequence]; --t) {
    if (!scan.mask || scan.mask[t]) {  // a hole is the identity: advantage and next value go through it
      const double delta = scan.rewards[t] + scan.gamma * next_value - scan.values[t];
      advantage = math::apply(math::Affine<double>{scan.gamma * scan.lam[sequence], delta}, advantage);
      next_value = scan.values[t];
    }
    scan.advantages[t] = static_cast<T>(advantage);
    scan.returns[t] = static_cast<T>(advantage + static_cast<double>(scan.values[t]));
  }
}

template <typename T>
void gae_all(const GaeScan<T>& scan) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t s = 0; s < scan.num_sequences; ++s) gae_sequence(scan, s);
}

template <typename T>
void discounted_all(const DiscountedScan<T>& scan) {
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t s = 0; s < scan.num_sequences; ++s) {
    double sum = 0.0;
    for (int64_t t = scan.cu_seqlens[s + 1] - 1; t >= scan.cu_seqlens[s]; --t) {
      sum = math::apply(math::Affine<double>{scan.gamma, static_cast<double>(scan.rewards[t])}, sum);
      scan.returns[t] = static_cast<T>(sum);
    }
  }
}

}  // namespace

void gae(const GaeScan<float>& scan) { gae_all(scan); }
void gae(const GaeScan<double>& scan) { gae_all(scan); }
void discounted_returns(const DiscountedScan<float>& scan) { discounted_all(scan); }
void discounted_returns(const DiscountedScan<double>& scan) { discounted_all(scan); }

}  // namespace fa::FA_ISA
