// Row kernels over logits [N, V] on the GPU.
//   logp_rows: one CTA of 512 threads a row, grid N; 16-byte loads; each thread keeps an online (max, sum, weighted sum) in fp32 and
//              the CTA merges them in a fixed tree, so a row's result depends on that row alone. Reads V logits once.
//   grad_rows: grid (N, ceil(V / 16384)); reads and writes V logits once, in place. The target's logit is read before the CTA that
//              owns it overwrites it: only that CTA needs it.
// Numerics: fp32 throughout; the element algebra is csrc/math's, shared with the CPU.
#include "linear_logp.h"

#include "../math/softmax.h"
#include "block.h"
#include "pack.h"

namespace fa::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kGradTile = 16384;  // elements a CTA

// Elements before the first 16-byte boundary: rows of an odd vocabulary start anywhere.
template <typename T>
__device__ __forceinline__ int64_t head_of(const T* row, int64_t n) {
  const int64_t head = ((16 - (reinterpret_cast<uintptr_t>(row) & 15)) & 15) / static_cast<int64_t>(sizeof(T));
  return head < n ? head : n;
}

struct Soften {
  float softcap, inv_softcap, inv_temperature;
};

// A thread's or CTA's view of a row: the softmax of what was seen, and the first arg-max of the raw logits.
struct RowState {
  math::Online<float> online;
  float best;
  int64_t arg;
};

__device__ __forceinline__ RowState merge(const RowState& a, const RowState& b) {
  RowState out;
  out.online = math::merge(a.online, b.online);
  const bool take_b = b.best > a.best || (b.best == a.best && b.arg < a.arg);
  out.best = take_b ? b.best : a.best;
  out.arg = take_b ? b.arg : a.arg;
  return out;
}

// A vector of elements is reduced around its own maximum, then merged: one rescale a vector, not one an element.
template <bool kEntropy, typename T, int kSize>
__device__ __forceinline__ void absorb(RowState& state, const T (&lane)[kSize], int64_t index, const Soften& s) {
  float z[kSize];
  float top = -INFINITY;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float raw = to_float(lane[i]);
    if (raw > state.best) state.best = raw, state.arg = index + i;
    z[i] = math::soften<uint32_t, float>(raw, s.softcap, s.inv_softcap, s.inv_temperature);
    top = fmaxf(top, z[i]);
  }
  math::Online<float>& o = state.online;
  if (top > o.max) {
    const float down = o.max - top;  // -inf before the first finite logit: everything so far was zero
    const float scale = math::exp(down);
    if (kEntropy) o.weighted = scale == 0.0f ? 0.0f * o.sum : scale * (o.weighted + down * o.sum);
    o.sum *= scale;
    o.max = top;
  }
  const float m = o.max == -INFINITY ? 0.0f : o.max;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const float down = z[i] - m, e = math::exp(down);
    o.sum += e;
    if (kEntropy) o.weighted += (down < math::kFloor ? math::kFloor : down) * e;
  }
}

__device__ __forceinline__ RowState shuffle_down(const RowState& state, int distance) {
  constexpr unsigned kAll = 0xffffffffu;
  RowState other;
  other.online.max = __shfl_down_sync(kAll, state.online.max, distance);
  other.online.sum = __shfl_down_sync(kAll, state.online.sum, distance);
  other.online.weighted = __shfl_down_sync(kAll, state.online.weighted, distance);
  other.best = __shfl_down_sync(kAll, state.best, distance);
  other.arg = __shfl_down_sync(kAll, state.arg, distance);
  return other;
}

// The CTA's state, in thread 0.
__device__ __forceinline__ RowState reduce(RowState state) {
  __shared__ RowState warps[kWarps];
  for (int distance = 16; distance > 0; distance /= 2) state = merge(state, shuffle_down(state, distance));
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = state;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kWarps; ++warp) state = merge(state, warps[warp]);
  return state;
}

template <bool kEntropy, typename T>
__global__ void __launch_bounds__(kThreads) logp_kernel(LogpRows<T> rows, Soften s) {
  const int64_t row = blockIdx.x;
  const T* x = rows.logits + row * rows.row_stride;
  RowState state{{}, -INFINITY, rows.vocab};
  // Packs are counted from the row's first element, wherever it lies: what a thread sums does not depend on the address.
  const int64_t packs = rows.vocab / Pack<T>::kSize, tail = packs * Pack<T>::kSize;
  const bool together = reinterpret_cast<uintptr_t>(x) % alignof(Pack<T>) == 0;
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
    const int64_t first = i * Pack<T>::kSize;
    Pack<T> pack;
    if (together) {
      pack = *reinterpret_cast<const Pack<T>*>(x + first);
    } else {
#pragma unroll
      for (int k = 0; k < Pack<T>::kSize; ++k) pack.lane[k] = x[first + k];
    }
    absorb<kEntropy>(state, pack.lane, first, s);
  }
  for (int64_t i = tail + threadIdx.x; i < rows.vocab; i += kThreads) {
    const T one[1] = {x[i]};
    absorb<kEntropy>(state, one, i, s);
  }
  state = reduce(state);
  if (threadIdx.x != 0) return;
  const int64_t target = rows.targets[row];
  const bool inside = target >= 0 && target < rows.vocab;  // outside: NaN, loud and in bounds
  const float raw = inside ? to_float(x[target]) : NAN;
  const float z = math::soften<uint32_t, float>(raw, s.softcap, s.inv_softcap, s.inv_temperature);
  const float log_sum = math::log_sum(state.online);
  rows.lse[row] = state.online.max + log_sum;
  rows.logp[row] = (z - state.online.max) - log_sum;
  if (kEntropy) rows.entropy[row] = math::entropy(state.online);
  rows.correct[row] = state.arg == target && state.online.sum == state.online.sum;
}

struct RowGrad {
  Soften soften;
  float lse, g_logp, g_entropy, entropy;
};

__device__ __forceinline__ float grad_element(float x, const RowGrad& g, bool is_target) {
  float slope = g.soften.inv_temperature;
  if (g.soften.softcap > 0.0f) {
    const float t = math::tanh(x * g.soften.inv_softcap);
    x = t * g.soften.softcap;
    slope *= 1.0f - t * t;
  }
  const float logp = x * g.soften.inv_temperature - g.lse;
  if (!is_target) return math::grad_other<uint32_t, float>(logp, g.g_logp, g.g_entropy, g.entropy) * slope;
  // 1 - p as -expm1(log p): what is left when p is near 1.
  const float from_entropy = math::grad_other<uint32_t, float>(logp, 0.0f, g.g_entropy, g.entropy);
  return (from_entropy - g.g_logp * expm1f(logp)) * slope;
}

// As many elements of U as a pack of T has, in one store.
template <typename T, typename U>
struct alignas(Pack<T>::kSize * sizeof(U)) Packed {
  U lane[Pack<T>::kSize];
};

template <typename T, typename U>
__global__ void __launch_bounds__(kThreads) grad_kernel(GradRows<T, U> rows, Soften s) {
  const int64_t row = blockIdx.x, begin = blockIdx.y * kGradTile;
  const int64_t n = rows.vocab - begin < kGradTile ? rows.vocab - begin : kGradTile;
  const T* x = rows.logits + row * rows.row_stride + begin;
  U* out = rows.out + row * rows.out_stride + begin;
  const int64_t target = rows.targets[row] - begin;
  const float g_entropy = rows.g_entropy ? rows.g_entropy[row] : 0.0f;
  const RowGrad g{s, rows.lse[row], rows.g_logp[row], g_entropy, rows.g_entropy ? rows.entropy[row] : 0.0f};
  const bool dead = g.g_logp == 0.0f && g.g_entropy == 0.0f;
  const int64_t head = head_of(x, n), packs = (n - head) / Pack<T>::kSize, tail = head + packs * Pack<T>::kSize;
  const bool together = reinterpret_cast<uintptr_t>(out + head) % alignof(Packed<T, U>) == 0;
  auto one = [&](int64_t i) { from_float(out[i], dead ? 0.0f : grad_element(to_float(x[i]), g, i == target)); };
  for (int64_t i = threadIdx.x; i < head; i += kThreads) one(i);
  const Pack<T>* aligned = reinterpret_cast<const Pack<T>*>(x + head);
  for (int64_t i = threadIdx.x; i < packs; i += kThreads) {
    const int64_t first = head + i * Pack<T>::kSize;
    const Pack<T> pack = aligned[i];
    Packed<T, U> result;
#pragma unroll
    for (int k = 0; k < Pack<T>::kSize; ++k)
      from_float(result.lane[k], dead ? 0.0f : grad_element(to_float(pack.lane[k]), g, first + k == target));
    if (together) {
      *reinterpret_cast<Packed<T, U>*>(out + first) = result;
    } else {
#pragma unroll
      for (int k = 0; k < Pack<T>::kSize; ++k) out[first + k] = result.lane[k];
    }
  }
  for (int64_t i = tail + threadIdx.x; i < n; i += kThreads) one(i);
}

Soften soften_of(float softcap, float inv_temperature) { return {softcap, softcap > 0.0f ? 1.0f / softcap : 0.0f, inv_temperature}; }

template <typename T>
void launch_logp(const LogpRows<T>& rows, uintptr_t stream) {
  if (rows.num_rows == 0) return;
  auto* kernel = rows.entropy ? &logp_kernel<true, T> : &logp_kernel<false, T>;
  launch("logp_rows", kernel, dim3(static_cast<unsigned>(rows.num_rows)), kThreads, stream, rows,
         soften_of(rows.softcap, rows.inv_temperature));
}

template <typename T, typename U>
void launch_grad(const GradRows<T, U>& rows, uintptr_t stream) {
  if (rows.num_rows == 0 || rows.vocab == 0) return;
  const dim3 grid(static_cast<unsigned>(rows.num_rows), static_cast<unsigned>((rows.vocab + kGradTile - 1) / kGradTile));
  launch("grad_rows", &grad_kernel<T, U>, grid, kThreads, stream, rows, soften_of(rows.softcap, rows.inv_temperature));
}

}  // namespace

void logp_rows(const LogpRows<float>& rows, uintptr_t stream) { launch_logp(rows, stream); }
void logp_rows(const LogpRows<uint16_t>& rows, uintptr_t stream) { launch_logp(rows, stream); }
void grad_rows(const GradRows<float>& rows, uintptr_t stream) { launch_grad(rows, stream); }
void grad_rows(const GradRows<uint16_t>& rows, uintptr_t stream) { launch_grad(rows, stream); }
void grad_rows(const GradRows<float, uint16_t>& rows, uintptr_t stream) { launch_grad(rows, stream); }

}  // namespace fa::cuda
