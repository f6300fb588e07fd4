// Checks and dispatch of the matrix products: fp32 or bf16 operands, fp32 results.
#include <stdexcept>
#include <string>

#include "calls.h"
#include "cpu/gemm.h"

namespace py = pybind11;

namespace fa {
namespace {

#if defined(__x86_64__) || defined(_M_X64)
bool by_tiles(bool bf16) { return bf16 && isa() == Isa::amx; }
void multiply(const Gemm& g) { g.tiles ? avx512::gemm_by_tiles(g) : FA_CALL(gemm, g); }
void pack(const Gemm& g, void* packed) { g.tiles ? avx512::gemm_pack_by_tiles(g, packed) : FA_CALL(gemm_pack, g, packed); }
int64_t side(const Gemm& g) { return g.tiles ? avx512::tile_side() : FA_CALL(gemm_panel); }
int64_t depth(const Gemm& g) { return g.tiles ? (g.k + avx512::tile_step() - 1) / avx512::tile_step() * avx512::tile_step() : g.k; }
#else
bool by_tiles(bool) { return false; }
void multiply(const Gemm& g) { FA_CALL(gemm, g); }
void pack(const Gemm& g, void* packed) { FA_CALL(gemm_pack, g, packed); }
int64_t side(const Gemm&) { return FA_CALL(gemm_panel); }
int64_t depth(const Gemm& g) { return g.k; }
#endif

// a [m, k] and b [k, n] with any strides, on the CPU.
Gemm operands(const Tensor& a, const Tensor& b) {
  if ((a.dtype != DType::f32 && a.dtype != DType::bf16) || a.dim() != 2)
    throw std::invalid_argument("gemm: a: expected float32 or bfloat16 [M, K], got " + Tensor::describe(a.dtype, a.shape));
  b.check("gemm: b", a.dtype, {a.size(1), -1});
  if (a.cuda || b.cuda) throw std::invalid_argument("gemm: expected tensors on the CPU, got one on a GPU");
  Gemm g{};
  g.a = a.data, g.b = b.data, g.bf16 = a.dtype == DType::bf16, g.tiles = by_tiles(g.bf16);
  g.a_row = a.stride(0), g.a_column = a.stride(1), g.b_row = b.stride(0), g.b_column = b.stride(1);
  g.m = a.size(0), g.k = a.size(1), g.n = b.size(1);
  return g;
}

std::vector<int64_t> packed_shape(const Gemm& g) { return {(g.n + side(g) - 1) / side(g), depth(g), side(g)}; }

void check_packed(const Tensor& packed, const Gemm& g) {
  packed.check("gemm: packed", g.bf16 ? DType::bf16 : DType::f32, packed_shape(g)).contiguous("gemm: packed");
  if (packed.cuda) throw std::invalid_argument("gemm: packed: expected a tensor on the CPU");
}

// The results are fp32 or, on tiles and where nothing is added, bf16.
DType result(const Gemm& g, const Tensor& out, bool add) {
  return g.tiles && !add && out.dtype == DType::bf16 ? DType::bf16 : DType::f32;
}
void into(Gemm& g, const Tensor& out, bool add) {
  g.add = add;
  if (out.dtype == DType::bf16)
    g.narrow = out.ptr<uint16_t>();
  else
    g.c = out.ptr<float>();
}

// out (+)= alpha * (a * b + bias); bias empty: none.
void gemm_into(const Tensor& a, const Tensor& b, const Tensor& bias, const Tensor& out, float alpha, bool add) {
  Gemm g = operands(a, b);
  out.check("gemm: out", result(g, out, add), {g.m, g.n});
  if (out.cuda || (g.n > 1 && out.stride(1) != 1)) throw std::invalid_argument("gemm: out: expected contiguous rows on the CPU");
  if (bias.numel()) g.bias = bias.check("gemm: bias", DType::f32, {g.n}).contiguous("gemm: bias").ptr<float>();
  g.c_row = out.stride(0), g.alpha = alpha;
  into(g, out, add);
  if (g.m == 0 || g.n == 0) return;
  py::gil_scoped_release release;
  multiply(g);
}

// out [..., n] = x [..., k] * packed + bias, both contiguous: the call of a decode step, with little to check and nothing to make.
void gemm_packed(const Tensor& x, const Tensor& packed, const Tensor& bias, const Tensor& out) {
  py::gil_scoped_release release;
  multiply_packed(x, packed, bias, out);
}

void pack_into(const Tensor& b, const Tensor& packed) {
  const Tensor row{nullptr, {0, b.dim() ? b.size(0) : 0}, {1, 1}, b.dtype, b.cuda};
  const Gemm g = operands(row, b);
  check_packed(packed, g);
  py::gil_scoped_release release;
  pack(g, packed.data);
}

py::tuple packed_shape_of(const Tensor& b) {
  const Tensor row{nullptr, {0, b.dim() ? b.size(0) : 0}, {1, 1}, b.dtype, b.cuda};
  const std::vector<int64_t> shape = packed_shape(operands(row, b));
  return py::make_tuple(shape[0], shape[1], shape[2]);
}

// total fp32 += alpha * part bf16, both contiguous and of one shape.
void add_widened(const Tensor& total, const Tensor& part, float alpha) {
  total.check("add_widened: total", DType::f32, part.shape).contiguous("add_widened: total");
  part.check("add_widened: part", DType::bf16, part.shape).contiguous("add_widened: part");
  if (total.cuda || part.cuda) throw std::invalid_argument("add_widened: expected tensors on the CPU, got one on a GPU");
  py::gil_scoped_release release;
  FA_CALL(add_widened, total.ptr<float>(), part.ptr<uint16_t>(), part.numel(), alpha);
}

}  // namespace

bool product_rounds(DType type, int64_t depth) { return by_tiles(type == DType::bf16) && depth <= kTilesDepth; }

void multiply_packed(const Tensor& x, const Tensor& packed, const Tensor& bias, const Tensor& out) {
  if ((x.dtype != DType::f32 && x.dtype != DType::bf16) || x.dim() < 1 || out.dim() < 1)
    throw std::invalid_argument("gemm_packed: x: expected float32 or bfloat16 [.., K], got " + Tensor::describe(x.dtype, x.shape));
  Gemm g{};
  g.k = x.shape.back(), g.n = out.shape.back();
  g.a = x.contiguous("gemm_packed: x").data, g.bf16 = x.dtype == DType::bf16, g.tiles = by_tiles(g.bf16);
  g.a_row = g.k, g.a_column = 1;
  std::vector<int64_t> shape = x.shape;
  shape.back() = g.n;
  out.check("gemm_packed: out", result(g, out, false), shape).contiguous("gemm_packed: out");
  g.m = g.n ? out.numel() / g.n : 0;
  check_packed(packed, g);
  g.packed = packed.data;
  if (bias.numel()) g.bias = bias.check("gemm_packed: bias", DType::f32, {g.n}).contiguous("gemm_packed: bias").ptr<float>();
  g.c_row = g.n, g.alpha = 1.0f;
  into(g, out, false);
  if (x.cuda || out.cuda) throw std::invalid_argument("gemm_packed: expected tensors on the CPU, got one on a GPU");
  if (g.m && g.n) multiply(g);
}

void bind_gemm(py::module_& m) {
  m.attr("gemm_tiles_depth") = kTilesDepth;
  m.def("gemm", &gemm_into, py::arg("a"), py::arg("b"), py::arg("bias"), py::arg("out"), py::arg("alpha"), py::arg("add"));
  m.def("gemm_packed", &gemm_packed, py::arg("x"), py::arg("packed"), py::arg("bias"), py::arg("out"));
  m.def("gemm_pack", &pack_into, py::arg("b"), py::arg("packed"));
  m.def("add_widened", &add_widened, py::arg("total"), py::arg("part"), py::arg("alpha"));
  m.def("gemm_packed_shape", &packed_shape_of, py::arg("b"), "What `gemm_pack` writes of b [k, n], with the instruction set in use.");
}

}  // namespace fa
