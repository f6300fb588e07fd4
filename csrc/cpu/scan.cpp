// GAE and discounted returns: one backward walk a sequence, sequences in parallel.
//
// x_t = shift_t + s x_{t+1} is a chain of one multiply-add a token, 4 cycles each. A sequence without holes is walked in blocks and
// its chain is cut to an eighth: three vectorized passes (distance 1, 2, 4) turn shift_t into the sum over 8 tokens, and then
// x_t = shift8_t + s^8 x_{t+8}, eight tokens at a time. The order of every sum depends on the sequence alone.
#include "scan.h"

#include "../math/gae.h"
#include "simd.h"

namespace fa::FA_ISA {
namespace {

constexpr int kBlock = 256, kLook = 8, kWidth = kLanes / 2;  // kWidth doubles a register

typedef double vd __attribute__((vector_size(kWidth * 8), aligned(8), may_alias));

FA_SIMD vd& lanes(double* x) { return *reinterpret_cast<vd*>(x); }

// What a block hands to the block before it.
struct Carry {
  double x, advantage;
};

// x[i] holds the shift of token i, x[size] what follows the block; then x[i] is what token i hands on.
FA_SIMD void chain(double* x, int size, double scale) {
  for (int i = size + 1; i < size + 3 * kLook; ++i) x[i] = 0.0;
  for (int distance = 1; distance < kLook; distance *= 2, scale *= scale)
    for (int i = 0; i <= size; i += kWidth) lanes(x + i) += scale * lanes(x + i + distance);
  vd after[kLook / kWidth]{};
  for (int i = size / kLook * kLook; i >= 0; i -= kLook)
    for (int j = 0; j < kLook / kWidth; ++j) lanes(x + i + j * kWidth) = after[j] = lanes(x + i + j * kWidth) + scale * after[j];
}

// Tokens begin .. begin + size - 1. Without values (discounted returns): value 0.
template <bool kValues, typename T>
Carry block_without_holes(const GaeScan<T>& scan, int64_t begin, int size, double lam, Carry carry) {
  const T* __restrict rewards = scan.rewards + begin;
  const T* __restrict values = kValues ? scan.values + begin : nullptr;
  T* __restrict advantages = scan.advantages + begin;
  T* __restrict returns = kValues ? scan.returns + begin : nullptr;
  const double gamma = scan.gamma;
  double surplus[kBlock], x[kBlock + 3 * kLook];
#pragma omp simd
  for (int i = 0; i < size; ++i) {
    const double value = kValues ? static_cast<double>(values[i]) : 0.0;
    surplus[i] = static_cast<double>(rewards[i]) - value;
    x[i] = math::gae_map(surplus[i], value, gamma, lam).shift;
  }
  x[size] = carry.x;
  chain(x, size, gamma * lam);
#pragma omp simd
  for (int i = 0; i < size; ++i) {
    const double advantage = math::gae_advantage(surplus[i], gamma, x[i + 1]);
    advantages[i] = static_cast<T>(advantage);
    if (kValues) returns[i] = static_cast<T>(advantage + static_cast<double>(values[i]));
  }
  return {x[0], 0.0};
}

template <typename T>
Carry block_with_holes(const GaeScan<T>& scan, int64_t begin, int size, double lam, Carry carry) {
  const double gamma = scan.gamma;
  for (int64_t t = begin + size - 1; t >= begin; --t) {
    const double value = scan.values[t], surplus = scan.rewards[t] - value;
    const bool valid = scan.mask[t];
    const double advantage = math::gae_advantage(surplus, gamma, carry.x);
    const double x = math::apply(math::gae_map(surplus, value, gamma, lam), carry.x);
    carry = {valid ? x : carry.x, valid ? advantage : carry.advantage};
    scan.advantages[t] = static_cast<T>(carry.advantage);
    scan.returns[t] = static_cast<T>(carry.advantage + value);
  }
  return carry;
}

template <bool kValues, typename T>
void scan_sequence(const GaeScan<T>& scan, int64_t sequence) {
  const double lam = scan.lams ? scan.lams[sequence] : scan.lam;
  Carry carry{scan.bootstrap ? static_cast<double>(scan.bootstrap[sequence]) : 0.0, 0.0};
  for (int64_t end = scan.cu_seqlens[sequence + 1]; end > scan.cu_seqlens[sequence];) {
    const int64_t left = end - scan.cu_seqlens[sequence];
    const int size = left < kBlock ? static_cast<int>(left) : kBlock;
    end -= size;
    carry = scan.mask ? block_with_holes(scan, end, size, lam, carry) : block_without_holes<kValues>(scan, end, size, lam, carry);
  }
}

template <bool kValues, typename T>
void scan_all(const GaeScan<T>& scan) {
  const int64_t per_task = scan.num_sequences / 256 + 1;  // one, unless there are so many that handing them out would be the work
#pragma omp parallel for schedule(dynamic, per_task)
  for (int64_t s = 0; s < scan.num_sequences; ++s) scan_sequence<kValues>(scan, s);
}

template <typename T>
void discounted_all(const DiscountedScan<T>& scan) {
  scan_all<false>(as_gae(scan));
}

}  // namespace

void gae(const GaeScan<float>& scan) { scan_all<true>(scan); }
void gae(const GaeScan<double>& scan) { scan_all<true>(scan); }
void discounted_returns(const DiscountedScan<float>& scan) { discounted_all(scan); }
void discounted_returns(const DiscountedScan<double>& scan) { discounted_all(scan); }

}  // namespace fa::FA_ISA
