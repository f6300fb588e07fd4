// Checks and dispatch of the rotary embedding: x and out [B, H, L, D] with contiguous rows, cos and sin [B or 1, L, D] contiguous.
#include "arguments.h"
#include "cpu/rope.h"

namespace py = pybind11;

namespace fa {
namespace {

void check_rows(const char* what, const Tensor& t, const Tensor& like) {
  t.check(what, like.dtype, like.shape);
  if (t.cuda || (t.shape[3] > 1 && t.stride(3) != 1 && t.numel()))
    throw std::invalid_argument(std::string(what) + ": expected contiguous rows on the CPU, got " + Tensor::describe(t.dtype, t.shape));
}

void rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& out, bool transposed) {
  by_element("rope: x", x, [&]<typename T>(T) {
    if (x.dim() != 4 || x.size(3) % 2)
      throw std::invalid_argument("rope: x: expected [B, H, L, D] with an even D, got " + Tensor::describe(x.dtype, x.shape));
    check_rows("rope: x", x, x);
    check_rows("rope: out", out, x);
    const bool shared = cos.dim() == 3 && cos.size(0) == 1;
    cos.check("rope: cos", x.dtype, {shared ? 1 : x.size(0), x.size(2), x.size(3)});
    const T* c = elements<T>("rope: cos", cos, cos);
    const T* s = elements<T>("rope: sin", sin, cos);
    if (cos.cuda) throw std::invalid_argument("rope: cos: expected a tensor on the CPU, got one on a GPU");
    const Rope<T> args{x.ptr<T>(), out.ptr<T>(), c, s, x.size(0), x.size(1), x.size(2), x.size(3), shared ? 0 : x.size(2) * x.size(3),
                       {x.stride(0), x.stride(1), x.stride(2)}, {out.stride(0), out.stride(1), out.stride(2)}, transposed};
    py::gil_scoped_release release;
    FA_CALL(rope, args);
  });
}

}  // namespace

void bind_rope(py::module_& m) {
  m.def("rope", &rope, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("out"), py::arg("transposed") = false);
}

}  // namespace fa
