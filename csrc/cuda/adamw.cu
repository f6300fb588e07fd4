// AdamW in one pass over memory, for fp32 weights and for bf16 weights with the low 16 bits of their fp32 master beside them.
//   Formula: csrc/math/adamw.h, shared with the CPU, to the bit: products are rounded before they are added, sqrt and division are IEEE.
//   Layout:  a thread has 8 consecutive elements, that is 16-byte loads and stores only: one a bf16 or int16 array, two an fp32 one.
//            A CTA of 256 threads covers 2048, grid ceil(n / 2048). What is left of n, and every element of arrays off a 16-byte
//            boundary, goes element by element.
//   Bytes:   28 an element with fp32 weights and gradient; 28 with bf16 weight and tail (26 with a bf16 gradient). Each is touched once.
//   Clip:    grad_scale is read from device memory, so the coefficient of a norm that is still being computed needs no synchronization.
//            The norm itself is a pass of its own (4 bytes an element), before this one.
#include "adamw.h"

#include "block.h"
#include "pack.h"

namespace fa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kItems = 8;  // elements a thread
constexpr int kTile = kThreads * kItems;

template <typename T>
__device__ __forceinline__ void load(T (&to)[kItems], const T* from) {
#pragma unroll
  for (int part = 0; part < kItems; part += Pack<T>::kSize) {
    const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + part);
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) to[part + i] = pack.lane[i];
  }
}

template <typename T>
__device__ __forceinline__ void store(T* to, const T (&from)[kItems]) {
#pragma unroll
  for (int part = 0; part < kItems; part += Pack<T>::kSize) {
    Pack<T> pack;
#pragma unroll
    for (int i = 0; i < Pack<T>::kSize; ++i) pack.lane[i] = from[part + i];
    *reinterpret_cast<Pack<T>*>(to + part) = pack;
  }
}

// kSplit: weight and tail, else param.
template <bool kSplit, typename Grad>
__device__ __forceinline__ void eight(const AdamWStep<Grad>& s, const math::AdamW& options, int64_t begin) {
  float master[kItems], exp_avg[kItems], exp_avg_sq[kItems];
  Grad grad[kItems];
  uint16_t weight[kItems];
  int16_t tail[kItems];
  load(grad, s.grad + begin);
  load(exp_avg, s.exp_avg + begin);
  load(exp_avg_sq, s.exp_avg_sq + begin);
  if constexpr (kSplit) {
    load(weight, s.weight + begin);
    load(tail, s.tail + begin);
  } else {
    load(master, s.param + begin);
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    if constexpr (kSplit) master[i] = math::join_master(weight[i], tail[i]);
    master[i] = math::adamw(master[i], to_float(grad[i]), exp_avg[i], exp_avg_sq[i], options);
    if constexpr (kSplit) math::split_master(master[i], weight[i], tail[i]);
  }
  store(s.exp_avg + begin, exp_avg);
  store(s.exp_avg_sq + begin, exp_avg_sq);
  if constexpr (kSplit) {
    store(s.weight + begin, weight);
    store(s.tail + begin, tail);
  } else {
    store(s.param + begin, master);
  }
}

template <bool kSplit, typename Grad>
__device__ __forceinline__ void one(const AdamWStep<Grad>& s, const math::AdamW& options, int64_t i) {
  const float master = kSplit ? math::join_master(s.weight[i], s.tail[i]) : s.param[i];
  float exp_avg = s.exp_avg[i], exp_avg_sq = s.exp_avg_sq[i];
  const float next = math::adamw(master, to_float(s.grad[i]), exp_avg, exp_avg_sq, options);
  s.exp_avg[i] = exp_avg;
  s.exp_avg_sq[i] = exp_avg_sq;
  if constexpr (kSplit)
    math::split_master(next, s.weight[i], s.tail[i]);
  else
    s.param[i] = next;
}

template <bool kSplit, typename Grad>
__global__ void __launch_bounds__(kThreads) adamw_kernel(AdamWStep<Grad> s, bool aligned) {
  math::AdamW options = s.options;
  if (s.grad_scale) options.grad_scale = math::product(options.grad_scale, *s.grad_scale);
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kTile, begin = tile + static_cast<int64_t>(threadIdx.x) * kItems;
  if (aligned && tile + kTile <= s.size) {
    eight<kSplit>(s, options, begin);
  } else {
    const int64_t end = tile + kTile < s.size ? tile + kTile : s.size;
    for (int64_t i = tile + threadIdx.x; i < end; i += kThreads) one<kSplit>(s, options, i);
  }
}

bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename Grad>
void launch_step(const AdamWStep<Grad>& s, uintptr_t stream) {
  if (s.size == 0) return;
  const bool aligned = on_16_bytes(s.param) && on_16_bytes(s.weight) && on_16_bytes(s.tail) && on_16_bytes(s.grad) &&
                       on_16_bytes(s.exp_avg) && on_16_bytes(s.exp_avg_sq);
  auto* kernel = s.param ? &adamw_kernel<false, Grad> : &adamw_kernel<true, Grad>;
  launch("adamw_step", kernel, dim3(static_cast<unsigned>((s.size + kTile - 1) / kTile)), kThreads, stream, s, aligned);
}

}  // namespace

void adamw_step(const AdamWStep<float>& step, uintptr_t stream) { launch_step(step, stream); }
void adamw_step(const AdamWStep<uint16_t>& step, uintptr_t stream) { launch_step(step, stream); }

}  // namespace fa::cuda
