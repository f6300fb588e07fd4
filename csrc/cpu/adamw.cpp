// adamw_step: reads weight, gradient and both moments once, writes weight and moments once (28 bytes an element in fp32; 26 with a
// bf16 weight, its tail and a bf16 gradient: memory-bound).
#include "adamw.h"

#include "simd.h"

namespace fa::FA_ISA {
namespace {

constexpr int64_t kBlock = 16384;  // elements a task

template <typename Grad>
void step_fp32(const AdamWStep<Grad>& s, int64_t begin, int64_t end) {
  const math::AdamW options = s.options;
  float* __restrict param = s.param;
  float* __restrict exp_avg = s.exp_avg;
  float* __restrict exp_avg_sq = s.exp_avg_sq;
  const Grad* __restrict grad = s.grad;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) param[i] = math::adamw(param[i], to_float(grad[i]), exp_avg[i], exp_avg_sq[i], options);
}

template <typename Grad>
void step_bf16(const AdamWStep<Grad>& s, int64_t begin, int64_t end) {
  const math::AdamW options = s.options;
  uint16_t* __restrict weight = s.weight;
  int16_t* __restrict tail = s.tail;
  float* __restrict exp_avg = s.exp_avg;
  float* __restrict exp_avg_sq = s.exp_avg_sq;
  const Grad* __restrict grad = s.grad;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const float master = math::join_master(weight[i], tail[i]);
    const float next = math::adamw(master, to_float(grad[i]), exp_avg[i], exp_avg_sq[i], options);
    math::split_master(next, weight[i], tail[i]);
  }
}

template <typename Grad>
void step_all(AdamWStep<Grad> s) {
  if (s.grad_scale) s.options.grad_scale *= *s.grad_scale;
#pragma omp parallel for schedule(static)
  for (int64_t begin = 0; begin < s.size; begin += kBlock) {
    const int64_t end = begin + kBlock < s.size ? begin + kBlock : s.size;
    s.param ? step_fp32(s, begin, end) : step_bf16(s, begin, end);
  }
}

}  // namespace

void adamw_step(const AdamWStep<float>& step) { step_all(step); }
void adamw_step(const AdamWStep<uint16_t>& step) { step_all(step); }

}  // namespace fa::FA_ISA
