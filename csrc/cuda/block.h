// The block-level primitives that the kernels use: launch, barrier, shuffle, shared memory. Under nvcc they are CUDA's own; a C++
// compiler gets their host twin, so that a kernel's logic is executed and tested where there is no GPU (tests/test_cuda_twin.py).
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#define FA_DYNAMIC_SHARED(type, name)                       \
  extern __shared__ __align__(16) unsigned char fa_shared[]; \
  type* name = reinterpret_cast<type*>(fa_shared)

namespace fa::cuda {

template <typename... Parameters>
void launch_shared(const char* what, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, uintptr_t stream,
                   const Parameters&... arguments) {
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 32 << 10)  // above 48 KiB it must be asked for, and what the kernel declares itself counts too
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    kernel<<<grid, threads, shared_bytes, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": CUDA launch failed: " + cudaGetErrorString(error));
}

}  // namespace fa::cuda
#else
#include "host_block.h"
#endif

namespace fa::cuda {

// Grid of blocks of `threads`, on the stream; throws std::runtime_error when the launch fails.
template <typename... Parameters>
void launch(const char* what, void (*kernel)(Parameters...), dim3 grid, int threads, uintptr_t stream, const Parameters&... arguments) {
  launch_shared(what, kernel, grid, threads, 0, stream, arguments...);
}

}  // namespace fa::cuda
