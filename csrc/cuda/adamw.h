// The CUDA twin of csrc/cpu/adamw.h: same arguments, device pointers, a stream.
#pragma once
#include <cstdint>

#include "../cpu/adamw.h"

namespace fa::cuda {

// Launch on `stream` (a cudaStream_t) of the current device; throw std::runtime_error when the launch fails.
void adamw_step(const AdamWStep<float>& step, uintptr_t stream);
void adamw_step(const AdamWStep<uint16_t>& step, uintptr_t stream);

}  // namespace fa::cuda
