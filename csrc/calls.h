// What one binding asks of another's op: checked as from Python, without the GIL.
#pragma once
#include "tensor.h"

namespace fa {

// A step over a paged cache (ops/attention.py, PagedLayout): one layer's cache, the step's rows, how scores are made.
struct PagedStep {
  const Tensor &k_cache, &v_cache, &slots, &cu_seqlens, &context_lens, &block_tables;
  double scale;
  int64_t window;  // 0: none
  double softcap;  // 0: none
};

// Stores k and v by slot and attends; rows of out past the step's are zero. q, k, v [T, heads, head_dim], out contiguous.
void attend_paged(const Tensor& q, const Tensor& k, const Tensor& v, const PagedStep& step, const Tensor& out);

// out [.., n] = x [.., k] * packed + bias, fp32 [n] or empty; out is fp32, or bf16 where `product_rounds`.
void multiply_packed(const Tensor& x, const Tensor& packed, const Tensor& bias, const Tensor& out);

// Whether a product of this depth writes bf16 itself.
bool product_rounds(DType type, int64_t depth);

}  // namespace fa
