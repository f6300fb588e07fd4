// A decoder layer of a generation step in one call: the ops that its own forward calls one by one, with the same arguments.
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>

#include "arguments.h"
#include "calls.h"
#include "cpu/decoder_layer.h"
#include "cpu/rms_norm.h"
#include "cpu/rope.h"
#include "cpu/swiglu.h"

namespace py = pybind11;

namespace fa {
namespace {

constexpr size_t kProducts = 7;
enum Of : size_t { kQ, kK, kV, kO, kGate, kUp, kDown };  // in order, of the products
enum Norm : size_t { kBefore, kBetween, kNormQ, kNormK };

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("decoder_layer: " + what); }

struct Call {
  const std::vector<Tensor>&packed, &biases;  // of the products; no bias: empty
  const std::vector<int64_t>& columns;        // of the products
  const std::vector<Tensor>& norms;
  const std::vector<float>& eps;
  const Tensor &cos, &sin;  // [1, T, head_dim]
  const PagedStep& step;
  const std::vector<Tensor>& kept;  // where the products are to stay, each [1, T, columns] or empty; none: nowhere
};

// Memory that is not filled first.
template <typename T>
using Memory = std::unique_ptr<T[]>;
template <typename T>
Memory<T> memory(int64_t size) {
  return Memory<T>(new T[static_cast<size_t>(size)]);
}

template <typename T>
struct Layer {
  const Call& call;
  const int64_t rows, width, head_dim;
  Memory<float> wide{};  // sums of a product that does not round

  static constexpr DType type = sizeof(T) == 4 ? DType::f32 : DType::bf16;

  static Tensor table(const void* data, std::vector<int64_t> shape) {
    Tensor t{const_cast<void*>(data), std::move(shape), {}, type, false};
    t.strides.assign(t.shape.size(), 1);
    for (size_t i = t.shape.size(); i-- > 1;) t.strides[i - 1] = t.strides[i] * t.shape[i];
    return t;
  }

  // Memory of a product: the caller's, or `own` that lasts as long as the layer.
  T* place(Of of, Memory<T>& own) const {
    if (!call.kept.empty() && call.kept[of].numel()) return call.kept[of].template ptr<T>();
    own = memory<T>(rows * call.columns[of]);
    return own.get();
  }

  // The sums of x * weight + bias, in `to` where the product writes T, else in fp32.
  const float* sums(Of of, const T* x, int64_t depth, T* to) {
    const int64_t n = call.columns[of];
    const Tensor* bias = &call.biases[of];
    Memory<float> widened;
    Tensor wide_bias;
    if constexpr (sizeof(T) == 2) {
      if (bias->numel()) {
        widened = memory<float>(n);
        FA_CALL(widen, bias->check("decoder_layer: bias", type, {n}).contiguous("decoder_layer: bias").template ptr<T>(), n, widened.get());
        wide_bias = *bias;
        wide_bias.data = widened.get(), wide_bias.dtype = DType::f32;
        bias = &wide_bias;
      }
    }
    Tensor out = table(to, {rows, n});
    if (sizeof(T) == 2 && !product_rounds(type, depth)) out.dtype = DType::f32, out.data = wide.get();
    multiply_packed(table(x, {rows, depth}), call.packed[of], *bias, out);
    return out.data == wide.get() ? wide.get() : nullptr;
  }

  void multiply(Of of, const T* x, int64_t depth, T* to) {
    const float* fp32 = sums(of, x, depth, to);
    if constexpr (sizeof(T) == 2)
      if (fp32) FA_CALL(round_to, fp32, rows * call.columns[of], to);
  }

  // to = onto + x * weight + bias
  void multiply_add(Of of, const T* x, int64_t depth, T* scratch, const T* onto, T* to) {
    const int64_t size = rows * call.columns[of];
    if (!call.kept.empty() && call.kept[of].numel()) {
      T* product = call.kept[of].template ptr<T>();
      multiply(of, x, depth, product);
      FA_CALL(add, onto, static_cast<const T*>(product), size, to);
      return;
    }
    const float* fp32 = sums(of, x, depth, scratch);
    fp32 ? FA_CALL(add, onto, fp32, size, to) : FA_CALL(add, onto, static_cast<const T*>(scratch), size, to);
  }

  void normalize(Norm of, const T* x, int64_t count, int64_t size, T* to) const {
    const Tensor& weight = call.norms[of].check("decoder_layer: norm", type, {size}).contiguous("decoder_layer: norm");
    const RmsNorm<T> norm{x, weight.template ptr<T>(), count, size, call.eps[of]};
    FA_CALL(rms_norm, norm, to);
  }

  void rotate(const T* x, int64_t heads, T* to) const {
    const int64_t row = heads * head_dim;
    const Rope<T> rotation{x, to, call.cos.ptr<T>(), call.sin.ptr<T>(), 1, heads, rows, head_dim, 0, {0, head_dim, row}, {0, head_dim, row}, false};
    FA_CALL(rope, rotation);
  }

  void run(const T* x, T* out) {
    const auto& n = call.columns;
    if (sizeof(T) == 2) wide = memory<float>(rows * *std::max_element(n.begin(), n.end()));
    const Memory<T> inner = memory<T>(rows * width), normal_q = memory<T>(rows * n[kQ]), normal_k = memory<T>(rows * n[kK]);
    const Memory<T> turned_q = memory<T>(rows * n[kQ]), turned_k = memory<T>(rows * n[kK]);
    Memory<T> own_q, own_k, own_v, own_gate, own_up;
    T *q = place(kQ, own_q), *k = place(kK, own_k), *v = place(kV, own_v), *gate = place(kGate, own_gate), *up = place(kUp, own_up);
    normalize(kBefore, x, rows, width, inner.get());
    multiply(kQ, inner.get(), width, q);
    multiply(kK, inner.get(), width, k);
    multiply(kV, inner.get(), width, v);
    const int64_t heads = n[kQ] / head_dim, kv_heads = n[kK] / head_dim;
    if (call.norms.size() > kNormQ) {
      normalize(kNormQ, q, rows * heads, head_dim, normal_q.get());
      normalize(kNormK, k, rows * kv_heads, head_dim, normal_k.get());
      q = normal_q.get(), k = normal_k.get();
    }
    rotate(q, heads, turned_q.get());
    rotate(k, kv_heads, turned_k.get());
    T* seen = normal_q.get();  // what was not turned is not read again
    attend_paged(table(turned_q.get(), {rows, heads, head_dim}), table(turned_k.get(), {rows, kv_heads, head_dim}),
                 table(v, {rows, kv_heads, head_dim}), call.step, table(seen, {rows, heads, head_dim}));
    multiply_add(kO, seen, n[kQ], inner.get(), x, out);
    normalize(kBetween, out, rows, width, inner.get());
    multiply(kGate, inner.get(), width, gate);
    multiply(kUp, inner.get(), width, up);
    const Memory<T> gated = memory<T>(rows * n[kGate]);
    const Swiglu<T> gates{gate, up, rows * n[kGate]};
    FA_CALL(swiglu, gates, gated.get());
    multiply_add(kDown, gated.get(), n[kGate], inner.get(), out, out);
  }
};

void decoder_layer(const Tensor& x, const std::vector<Tensor>& packed, const std::vector<Tensor>& biases,
                   const std::vector<int64_t>& columns, const std::vector<Tensor>& norms, const std::vector<float>& eps, const Tensor& cos, const Tensor& sin, const Tensor& k_cache,
                   const Tensor& v_cache, const Tensor& slots, const Tensor& cu_seqlens, const Tensor& context_lens, const Tensor& block_tables,
                   double scale, int64_t window, double softcap, const Tensor& out, const std::vector<Tensor>& kept) {
  by_element("decoder_layer: x", x, [&]<typename T>(T) {
    if (x.dim() != 3 || x.size(0) != 1 || k_cache.dim() != 4) refuse("expected x [1, T, width] and caches [blocks, heads, block_size, head_dim]");
    const int64_t rows = x.size(1), width = x.size(2), head_dim = k_cache.size(3);
    if (packed.size() != kProducts || biases.size() != kProducts || columns.size() != kProducts)
      refuse("expected seven products with their biases and columns");
    if ((norms.size() != 2 && norms.size() != 4) || eps.size() != norms.size()) refuse("expected two or four norms with their eps");
    const bool heads = head_dim > 0 && head_dim % 2 == 0 && columns[kQ] % head_dim == 0 && columns[kK] == k_cache.size(1) * head_dim;
    if (!heads || columns[kK] != columns[kV] || columns[kGate] != columns[kUp] || columns[kO] != width || columns[kDown] != width)
      refuse("the products' columns do not fit together");
    cos.check("decoder_layer: cos", x.dtype, {1, rows, head_dim});
    elements<T>("decoder_layer: cos", cos, cos);
    elements<T>("decoder_layer: sin", sin, cos);
    const T* from = elements<T>("decoder_layer: x", x, x);
    T* to = elements<T>("decoder_layer: out", out, x);
    const PagedStep step{k_cache, v_cache, slots, cu_seqlens, context_lens, block_tables, scale, window, softcap};
    if (!kept.empty() && kept.size() != kProducts) refuse("expected seven places to keep products in, or none");
    for (size_t i = 0; i < kept.size(); ++i)
      if (kept[i].numel()) kept[i].check("decoder_layer: kept", x.dtype, {1, rows, columns[i]}).contiguous("decoder_layer: kept");
    for (const auto* tensors : {&packed, &biases, &norms, &kept})
      for (const Tensor& t : *tensors)
        if (t.cuda) refuse("expected tensors on the CPU, got one on a GPU");
    const Call call{packed, biases, columns, norms, eps, cos, sin, step, kept};
    py::gil_scoped_release release;
    Layer<T>{call, rows, width, head_dim}.run(from, to);
  });
}

}  // namespace

void bind_decoder_layer(py::module_& m) {
  m.def("decoder_layer", &decoder_layer, py::arg("x"), py::arg("packed"), py::arg("biases"), py::arg("columns"), py::arg("norms"),
        py::arg("eps"), py::arg("cos"), py::arg("sin"), py::arg("k_cache"), py::arg("v_cache"), py::arg("slots"), py::arg("cu_seqlens"),
        py::arg("context_lens"), py::arg("block_tables"), py::arg("scale"), py::arg("window"), py::arg("softcap"), py::arg("out"), py::arg("kept"),
        "A layer's forward over a paged cache: products of q, k, v, o, gate, up, down (packed; an empty bias is none), norms before the "
        "attention, before the MLP, of the heads of q and of k. kept: where the products stay, an empty one: nowhere.");
}

}  // namespace fa
