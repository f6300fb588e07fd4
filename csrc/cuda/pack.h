// Elements as the kernels load and store them: bf16 as its 16 bits, 16 bytes at a time.
#pragma once
#include <cstdint>

#include "block.h"

namespace fa::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
__device__ __forceinline__ void from_float(float& to, float x) { to = x; }
// Round to nearest even; NaN stays NaN.
__device__ __forceinline__ void from_float(uint16_t& to, float x) {
  const uint32_t bits = __float_as_uint(x);
  to = x == x ? static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : static_cast<uint16_t>(0x7fc0);
}

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T lane[kSize];
};

}  // namespace fa::cuda
