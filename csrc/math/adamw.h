// One element of AdamW (Loshchilov and Hutter, arXiv:1711.05101, Algorithm 2, with one division), and the fp32 master
// weight kept as a bf16 weight plus 16 signed bits: master_bits = (bf16_bits << 16) + tail.
//
// The bf16 weight is the nearest one to the master, so the model computes with the best bf16 weights there are; ties go away from
// zero (to even, both neighbours of a tie would need the same tail). A NaN master keeps being NaN, its payload is not kept.
//
// Every product is rounded before it is added: no fused multiply-add, so that every instruction set and the GPU give the same bits
// (nvcc would fuse a * b + c; csrc/cpu/adamw.cpp is compiled with -ffp-contract=off). The step is bound by memory; it costs nothing.
#pragma once
#include "exp.h"

namespace fa::math {

struct AdamW {
  float keep;          // 1 - lr * weight_decay
  float one_minus_b1;  // 1 - beta1
  float beta2, one_minus_b2;
  float step_size;  // lr c / (1 - beta1^step), c = sqrt(1 - beta2^step)
  float eps;        // times c: m / (sqrt(v) / c + eps) with one division
  float grad_scale;
};

// x y, as a number of its own.
FA_MATH float product(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(x, y);
#else
  return x * y;
#endif
}

FA_MATH float adamw(float master, float grad, float& exp_avg, float& exp_avg_sq, const AdamW& a) {
  grad = product(grad, a.grad_scale);
  exp_avg += product(grad - exp_avg, a.one_minus_b1);
  exp_avg_sq = product(exp_avg_sq, a.beta2) + product(product(grad, a.one_minus_b2), grad);
  return product(master, a.keep) - product(a.step_size, exp_avg / (sqrtf(exp_avg_sq) + a.eps));
}

FA_MATH float join_master(uint16_t weight, int16_t tail) {
  return bits_of<float>((static_cast<uint32_t>(weight) << 16) + static_cast<uint32_t>(static_cast<int32_t>(tail)));
}

FA_MATH void split_master(float master, uint16_t& weight, int16_t& tail) {
  const uint32_t bits = bits_of<uint32_t>(master);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  weight = static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : (bits + 0x8000u) >> 16);
  tail = static_cast<int16_t>(nan ? 0 : bits & 0xffffu);
}

}  // namespace fa::math
