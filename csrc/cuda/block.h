// The block-level primitives that the kernels use: launch, barrier, shuffle, shared memory. Under nvcc they are CUDA's own; a C++
// compiler gets their host twin, so that a kernel's logic is executed and tested where there is no GPU (tests/test_cuda_twin.py).
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_runtime.h>

namespace fa::cuda {

template <typename... Parameters>
void launch(const char* what, void (*kernel)(Parameters...), dim3 grid, int threads, uintptr_t stream, const Parameters&... arguments) {
  kernel<<<grid, threads, 0, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": CUDA launch failed: " + cudaGetErrorString(error));
}

}  // namespace fa::cuda
#else
#include "host_block.h"
#endif
