// The host twin of csrc/cuda/block.h: a block's threads are fibers on one host thread, run in a seeded random order between barriers;
// a shuffle exchanges through memory. Blocks run one after another, in order. It finds wrong indices, reads of what was never written,
// missing barriers (another order, other results) and barriers that not every thread reaches (an exception). It says nothing about
// speed nor about every race; a real run on a device still has to follow.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static  // one block at a time
#define FA_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::fa::cuda::block.dynamic.data())

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace fa::cuda {

enum class Fiber { ready, at_block, at_warp, done };

struct Block {
  static constexpr size_t kStack = 64 << 10;
  std::vector<ucontext_t> contexts;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<Fiber> states;
  std::vector<std::array<char, 16>> exchanged;
  std::vector<char> dynamic;
  std::vector<std::vector<std::function<void()>>> copies;  // asynchronous ones, of each thread: made when it waits
  std::function<void()> body;
  ucontext_t scheduler;
  std::mt19937 random{1};
  int current = 0;

  void pause(Fiber state) {
    states[current] = state;
    swapcontext(&contexts[current], &scheduler);
  }
  static void enter();
  void run(int threads, const char* what);
  bool release(int from, int to, Fiber state) {
    if (!std::all_of(states.begin() + from, states.begin() + to, [&](Fiber s) { return s == state; })) return false;
    std::fill(states.begin() + from, states.begin() + to, Fiber::ready);
    return true;
  }
};
inline Block block;

inline void Block::enter() {
  block.body();
  block.pause(Fiber::done);
}

inline void Block::run(int threads, const char* what) {
  contexts.resize(threads);
  exchanged.resize(threads);
  copies.assign(threads, {});
  states.assign(threads, Fiber::ready);
  while (static_cast<int>(stacks.size()) < threads) stacks.push_back(std::make_unique<char[]>(kStack));
  std::vector<int> order(threads);
  for (int t = 0; t < threads; ++t) {
    order[t] = t;
    getcontext(&contexts[t]);
    contexts[t].uc_stack.ss_sp = stacks[t].get();
    contexts[t].uc_stack.ss_size = kStack;
    contexts[t].uc_link = nullptr;
    makecontext(&contexts[t], &Block::enter, 0);
  }
  for (;;) {
    std::shuffle(order.begin(), order.end(), random);
    bool moved = false;
    for (int t : order)
      if (states[t] == Fiber::ready) {
        current = t;
        threadIdx = dim3(static_cast<unsigned>(t));
        swapcontext(&scheduler, &contexts[t]);
        moved = true;
      }
    for (int warp = 0; warp < threads; warp += 32) moved |= release(warp, std::min(warp + 32, threads), Fiber::at_warp);
    moved |= release(0, threads, Fiber::at_block);
    if (std::all_of(states.begin(), states.end(), [](Fiber s) { return s == Fiber::done; })) return;
    if (!moved) throw std::runtime_error(std::string(what) + ": a barrier was not reached by every thread of its block or warp");
  }
}

// The kernel's parameters are taken by value, as a device gets them.
template <typename... Parameters>
void launch_shared(const char* what, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes, uintptr_t,
                   const Parameters&... arguments) {
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        block.dynamic.assign(shared_bytes, static_cast<char>(0xff));  // NaN in any float format
        block.body = [=] { kernel(arguments...); };
        block.run(threads, what);
      }
}

template <typename T>
T exchange(T value, int source) {
  static_assert(sizeof(T) <= 16);
  const int thread = block.current;
  std::memcpy(block.exchanged[thread].data(), &value, sizeof value);
  block.pause(Fiber::at_warp);
  T result;
  std::memcpy(&result, block.exchanged[source].data(), sizeof result);
  block.pause(Fiber::at_warp);
  return result;
}

}  // namespace fa::cuda

inline void __syncthreads() { fa::cuda::block.pause(fa::cuda::Fiber::at_block); }
inline void __syncwarp(unsigned = 0xffffffffu) { fa::cuda::block.pause(fa::cuda::Fiber::at_warp); }

template <typename T>
T __shfl_down_sync(unsigned, T value, int distance) {
  const int thread = fa::cuda::block.current;
  return fa::cuda::exchange(value, thread % 32 + distance < 32 ? thread + distance : thread);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const int thread = fa::cuda::block.current;
  return fa::cuda::exchange(value, thread % 32 >= distance ? thread - distance : thread);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return fa::cuda::exchange(value, fa::cuda::block.current ^ mask);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return fa::cuda::exchange(value, fa::cuda::block.current / 32 * 32 + lane % 32);
}

// cp.async: what was copied is not there before the thread has waited for it.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  fa::cuda::block.copies[fa::cuda::block.current].push_back([=] {
    std::memcpy(to, from, bytes - zeros);
    std::memset(static_cast<char*>(to) + bytes - zeros, 0, zeros);
  });
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(size_t) {  // waits for all
  auto& copies = fa::cuda::block.copies[fa::cuda::block.current];
  for (auto& copy : copies) copy();
  copies.clear();
}

template <typename T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}
template <typename T>
T __ldg(const T* from) {
  return *from;
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
