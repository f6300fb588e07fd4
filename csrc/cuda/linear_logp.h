// The CUDA twins of csrc/cpu/linear_logp.h: same arguments, device pointers, a stream.
#pragma once
#include <cstdint>

#include "../cpu/linear_logp.h"

namespace fa::cuda {

// Launch on `stream` (a cudaStream_t) of the current device; throw std::runtime_error when the launch fails.
void logp_rows(const LogpRows<float>& rows, uintptr_t stream);
void logp_rows(const LogpRows<uint16_t>& rows, uintptr_t stream);
void grad_rows(const GradRows<float>& rows, uintptr_t stream);
void grad_rows(const GradRows<uint16_t>& rows, uintptr_t stream);
void grad_rows(const GradRows<float, uint16_t>& rows, uintptr_t stream);  // out: memory of its own, or another row's would be overwritten

}  // namespace fa::cuda
