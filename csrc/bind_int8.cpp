// Checks and dispatch of the products with int8 weights: by the dtype of the activations.
#include <stdexcept>
#include <string>

#include "cpu/int8.h"
#include "tensor.h"

namespace py = pybind11;

namespace fa {
namespace {

// words of ceil(n / 16) panels; bias empty: none.
void int8_product(const Tensor& x, const Tensor& words, const Tensor& scale, const Tensor& bias, const Tensor& out) {
  if ((x.dtype != DType::f32 && x.dtype != DType::bf16) || x.dim() != 2)
    throw std::invalid_argument("int8_product: x: expected float32 or bfloat16 [M, K], got " + Tensor::describe(x.dtype, x.shape));
  if (x.size(1) > 1 && x.stride(1) != 1)
    throw std::invalid_argument("int8_product: x: expected contiguous rows, got a stride of " + std::to_string(x.stride(1)));
  for (const Tensor* t : {&x, &words, &scale, &bias, &out})
    if (t->cuda) throw std::invalid_argument("int8_product: expected tensors on the CPU, got one on a GPU");
  const int64_t m = x.size(0), k = x.size(1), n = scale.numel();
  scale.check("int8_product: scale", DType::f32, {n}).contiguous("int8_product: scale");
  words.check("int8_product: words", DType::i32, {(n + kInt8Columns - 1) / kInt8Columns, (k + kInt8Depth - 1) / kInt8Depth, kInt8Columns});
  words.contiguous("int8_product: words");
  out.check("int8_product: out", x.dtype, {m, n}).contiguous("int8_product: out");
  const bool biased = bias.numel() > 0;
  if (biased) bias.check("int8_product: bias", DType::f32, {n}).contiguous("int8_product: bias");
  if (m == 0 || n == 0) return;
  const Int8Product product{x.data, x.stride(0), x.dtype == DType::bf16, words.ptr<uint32_t>(), scale.ptr<float>(),
                            biased ? bias.ptr<float>() : nullptr, out.data, m, n, k, has_bf16_dot()};
  py::gil_scoped_release release;
  FA_CALL(int8_product, product);
}

}  // namespace

void bind_int8(py::module_& m) {
  m.def("int8_product", &int8_product, py::arg("x"), py::arg("words"), py::arg("scale"), py::arg("bias"), py::arg("out"));
}

}  // namespace fa
