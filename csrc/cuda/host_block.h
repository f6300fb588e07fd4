// The host twin of csrc/cuda/block.h: a block's threads are real threads, a barrier is a barrier, a shuffle exchanges through memory.
// Blocks run one after another. It finds wrong indices, barriers that not every thread reaches (a hang) and reads of what was never
// written; it says nothing about speed, and a real run on a device still has to follow.
#pragma once
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static  // one block at a time

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline thread_local dim3 threadIdx, blockIdx;

namespace fa::cuda {

constexpr int kMaxThreads = 1024;
struct Block {
  std::unique_ptr<std::barrier<>> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  uint64_t exchanged[kMaxThreads];
};
inline Block block;

template <typename... Parameters>
void launch(const char*, void (*kernel)(Parameters...), dim3 grid, int threads, uintptr_t, const Parameters&... arguments) {
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      block.all = std::make_unique<std::barrier<>>(threads);
      block.warps.clear();
      for (int warp = 0; warp < threads / 32; ++warp) block.warps.push_back(std::make_unique<std::barrier<>>(32));
      std::vector<std::thread> running;
      for (int thread = 0; thread < threads; ++thread)
        running.emplace_back([=] {
          threadIdx = dim3(static_cast<unsigned>(thread));
          blockIdx = dim3(x, y);
          kernel(arguments...);
        });
      for (auto& thread : running) thread.join();
    }
}

}  // namespace fa::cuda

inline void __syncthreads() { fa::cuda::block.all->arrive_and_wait(); }

template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
  const int thread = static_cast<int>(threadIdx.x), source = thread % 32 + distance < 32 ? thread + distance : thread;
  auto& warp = *fa::cuda::block.warps[thread / 32];
  std::memcpy(&fa::cuda::block.exchanged[thread], &value, sizeof value);
  warp.arrive_and_wait();
  T result;
  std::memcpy(&result, &fa::cuda::block.exchanged[source], sizeof result);
  warp.arrive_and_wait();
  return result;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
