// Preference losses on the GPU, one launch each way.
//   pairs, singles: one CTA of 128 threads a pair (a completion); every log-prob is read once, neighbours by neighbouring threads. The
//                   threads' sums are added in a fixed tree, thread 0 evaluates the formula and writes loss, metrics and slopes.
//   spread:         one CTA a sequence writes its gradient, 4 bytes a token (8 in fp64).
// Numerics: sums and formulas in fp64 (two scores a pair), rounded once; the algebra is csrc/math's, shared with the CPU.
#include "preference.h"

#include "block.h"

namespace fa::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The CTA's total, in thread 0. `part` is [kWarps] of shared memory that no other total uses.
__device__ __forceinline__ double total(double x, double* part) {
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_down_sync(0xffffffffu, x, distance);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kWarps; ++warp) x += part[warp];
  return x;
}

template <typename T>
__device__ __forceinline__ math::Sums sums(const Sequences<T>& s, int64_t sequence, int64_t head, double tail, double* part) {
  const int64_t begin = s.cu_targets[sequence], end = s.cu_targets[sequence + 1], cut = least(begin + head, end);
  const bool both = s.ref_logp && s.ref_per_token;
  double logp = 0.0, ref_logp = 0.0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    const double weight = i < cut ? 1.0 : tail;
    logp += weight * static_cast<double>(s.logp[i]);
    if (both) ref_logp += weight * static_cast<double>(s.ref_logp[i]);
  }
  logp = total(logp, part);
  if (both) ref_logp = total(ref_logp, part + kWarps);
  if (s.ref_logp && !s.ref_per_token) ref_logp = static_cast<double>(s.ref_logp[sequence]);
  return {logp, ref_logp, end - begin};
}

template <typename T>
__global__ void __launch_bounds__(kThreads) pairs_kernel(Pairs<T> p) {
  __shared__ double part[4 * kWarps];
  const int64_t pair = blockIdx.x;
  const int32_t* cu = p.sequences.cu_targets + 2 * pair;
  const int64_t head = least(cu[1] - cu[0], cu[2] - cu[1]);
  const math::Sums chosen = sums(p.sequences, 2 * pair, head, p.tail, part);
  const math::Sums rejected = sums(p.sequences, 2 * pair + 1, head, p.tail, part + 2 * kWarps);
  if (threadIdx.x != 0) return;
  const double margin = p.margin ? static_cast<double>(p.margin[pair]) : 0.0;
  const double weight = p.weight ? static_cast<double>(p.weight[pair]) : 1.0;
  const math::PairResult result = math::pair_of_sums(p.formula, chosen, rejected, margin, weight);
  math::store_pair(result, chosen, rejected, pair, p.num_pairs, p.losses, p.metrics, p.slopes);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) singles_kernel(Singles<T> p) {
  __shared__ double part[2 * kWarps];
  const int64_t i = blockIdx.x;
  const math::Sums one = sums(p.sequences, i, 0, 1.0, part);
  if (threadIdx.x != 0) return;
  const math::Scored result = math::single_loss(p.formula, one.logp - one.ref_logp, p.labels[i]);
  const double weight = p.weight ? static_cast<double>(p.weight[i]) : 1.0;
  math::store_single(result, one, weight, p.formula.beta, i, p.num_sequences, p.losses, p.metrics, p.slopes);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) spread_kernel(Spread<T> s) {
  const int64_t sequence = blockIdx.x, other = s.unit == 2 ? sequence ^ 1 : sequence;
  const int64_t begin = s.cu_targets[sequence], end = s.cu_targets[sequence + 1];
  const int64_t cut = begin + s.cu_targets[other + 1] - s.cu_targets[other];
  const double slope = static_cast<double>(s.upstream[sequence / s.unit * s.upstream_stride]) * static_cast<double>(s.slopes[sequence]);
  const T head = static_cast<T>(slope), tail = static_cast<T>(slope * s.tail);
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) s.gradient[i] = i < cut ? head : tail;
}

template <typename Arguments>
void launch_each(const char* what, void (*kernel)(Arguments), int64_t blocks, uintptr_t stream, const Arguments& arguments) {
  if (blocks > 0) launch(what, kernel, dim3(static_cast<unsigned>(blocks)), kThreads, stream, arguments);
}

}  // namespace

void preference_pairs(const Pairs<float>& p, uintptr_t stream) { launch_each("preference_pairs", &pairs_kernel<float>, p.num_pairs, stream, p); }
void preference_pairs(const Pairs<double>& p, uintptr_t stream) {
  launch_each("preference_pairs", &pairs_kernel<double>, p.num_pairs, stream, p);
}
void preference_singles(const Singles<float>& p, uintptr_t stream) {
  launch_each("preference_singles", &singles_kernel<float>, p.num_sequences, stream, p);
}
void preference_singles(const Singles<double>& p, uintptr_t stream) {
  launch_each("preference_singles", &singles_kernel<double>, p.num_sequences, stream, p);
}
void preference_spread(const Spread<float>& s, uintptr_t stream) {
  launch_each("preference_spread", &spread_kernel<float>, s.num_sequences, stream, s);
}
void preference_spread(const Spread<double>& s, uintptr_t stream) {
  launch_each("preference_spread", &spread_kernel<double>, s.num_sequences, stream, s);
}

}  // namespace fa::cuda
