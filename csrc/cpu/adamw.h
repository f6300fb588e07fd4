// AdamW over flat, contiguous tensors, in one pass. Grad: float, or uint16_t for bf16.
#pragma once
#include <cstdint>

#include "../math/adamw.h"
#include "isa.h"

namespace fa {

template <typename Grad>
struct AdamWStep {
  float* param;      // fp32 weights, or null
  uint16_t* weight;  // bf16 weights with their tails, where param is null
  int16_t* tail;
  const Grad* grad;
  float* exp_avg;
  float* exp_avg_sq;
  int64_t size;
  const float* grad_scale;  // one number in the memory of the device, times options.grad_scale; or null
  math::AdamW options;
};

}  // namespace fa

FA_DECLARE(void adamw_step(const AdamWStep<float>& step); void adamw_step(const AdamWStep<uint16_t>& step);)
