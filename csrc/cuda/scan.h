// The CUDA twins of csrc/cpu/scan.h: same arguments, device pointers, a workspace and a stream.
#pragma once
#include <cstdint>

#include "../cpu/scan.h"

namespace fa::cuda {

// Doubles of workspace for that many tokens.
int64_t scan_workspace(int64_t num_tokens);

// Launch on `stream` (a cudaStream_t) of the current device; throw std::runtime_error when the launch fails. Offsets are not checked:
// wrong ones read nothing out of bounds, and a token that no sequence holds gets NaN.
void gae(const GaeScan<float>& scan, int64_t num_tokens, double* workspace, uintptr_t stream);
void gae(const GaeScan<double>& scan, int64_t num_tokens, double* workspace, uintptr_t stream);
void discounted_returns(const DiscountedScan<float>& scan, int64_t num_tokens, double* workspace, uintptr_t stream);
void discounted_returns(const DiscountedScan<double>& scan, int64_t num_tokens, double* workspace, uintptr_t stream);

}  // namespace fa::cuda
