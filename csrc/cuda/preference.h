// The CUDA twins of csrc/cpu/preference.h: same arguments, device pointers, a stream.
#pragma once
#include <cstdint>

#include "../cpu/preference.h"

namespace fa::cuda {

// Launch on `stream` (a cudaStream_t) of the current device; throw std::runtime_error when the launch fails.
void preference_pairs(const Pairs<float>& pairs, uintptr_t stream);
void preference_pairs(const Pairs<double>& pairs, uintptr_t stream);
void preference_singles(const Singles<float>& singles, uintptr_t stream);
void preference_singles(const Singles<double>& singles, uintptr_t stream);
void preference_spread(const Spread<float>& spread, uintptr_t stream);
void preference_spread(const Spread<double>& spread, uintptr_t stream);

}  // namespace fa::cuda
