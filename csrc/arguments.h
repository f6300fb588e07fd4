// What several bindings ask of their arguments: a real tensor of one shape, offsets that rise, the element type.
#pragma once
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensor.h"

namespace fa {

template <typename T>
constexpr DType dtype_of() {
  static_assert(std::is_floating_point_v<T>);
  return sizeof(T) == 4 ? DType::f32 : DType::f64;
}

// The contiguous elements of a float or double tensor of this shape.
template <typename T>
T* typed(const char* what, const Tensor& t, std::vector<int64_t> shape) {
  return t.check(what, dtype_of<T>(), std::move(shape)).contiguous(what).template ptr<T>();
}

// Offsets in host memory are read here; reading them from a device would wait for it.
inline const int32_t* offsets(const char* what, const Tensor& t, int64_t num, const char* of = "tokens") {
  t.check(what, DType::i32, {-1}).contiguous(what);
  const int32_t* cu = t.ptr<int32_t>();
  if (t.cuda) return cu;
  const int64_t count = t.size(0);
  bool ok = count > 0 && cu[0] == 0 && cu[count - 1] == num;
  for (int64_t s = 1; ok && s < count; ++s) ok = cu[s - 1] <= cu[s];
  if (ok) return cu;
  std::string got;
  for (int64_t s = 0; s < count && s < 16; ++s) got += (s ? ", " : "") + std::to_string(cu[s]);
  throw std::invalid_argument(std::string(what) + " must rise from 0 to the " + std::to_string(num) + " " + of + ", got [" + got + "]");
}

// run(double{}) for float64, else run(float{}), whose checks name the dtype they expect.
template <typename Run>
void by_dtype(const Tensor& t, Run run) {
  t.dtype == DType::f64 ? run(double{}) : run(float{});
}

// run(float{}) for float32, run(uint16_t{}) for bfloat16; anything else, and a tensor on a GPU, is refused.
template <typename Run>
void by_element(const char* what, const Tensor& t, Run run) {
  if (t.cuda) throw std::invalid_argument(std::string(what) + ": expected a tensor on the CPU, got one on a GPU");
  if (t.dtype == DType::f32) return run(float{});
  if (t.dtype == DType::bf16) return run(uint16_t{});
  throw std::invalid_argument(std::string(what) + ": expected float32 or bfloat16, got " + Tensor::describe(t.dtype, t.shape));
}

// The contiguous elements of a tensor of the same dtype, shape and device as `like`.
template <typename T>
T* elements(const char* what, const Tensor& t, const Tensor& like) {
  if (t.cuda != like.cuda) throw std::invalid_argument(std::string(what) + ": expected a tensor on the CPU, got one on a GPU");
  return t.check(what, like.dtype, like.shape).contiguous(what).template ptr<T>();
}

}  // namespace fa
