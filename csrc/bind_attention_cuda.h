// Checks, plan and dispatch of paged attention on the GPU.
#pragma once
#include <stdexcept>
#include <string>

#include "cuda/attention.h"
#include "cuda/attention_plan.h"
#include "tensor.h"

namespace fa {

namespace py = pybind11;

inline std::vector<int64_t> host_integers(const char* what, const Tensor& t, int64_t count) {
  t.check(what, DType::i32, {count}).contiguous(what);
  if (t.cuda) throw std::invalid_argument(std::string(what) + ": expected a tensor on the CPU");
  return {t.ptr<int32_t>(), t.ptr<int32_t>() + t.numel()};
}

// (plan as int32 bytes, tokens, cells, items of each size): see PagedAttention in cuda/attention.h. With max_tokens and max_cells the last
// three are those of launches that serve every step within these bounds.
inline py::tuple paged_plan(const Tensor& cu_seqlens, const Tensor& context_lens, const Tensor& block_tables, int64_t block_size,
                            int64_t num_blocks, int64_t group, int64_t window, int64_t max_fresh, int64_t max_tokens, int64_t max_cells) {
  const int64_t sequences = context_lens.dim() == 1 ? context_lens.size(0) : -1;
  cuda::Step step{};
  step.bounds = host_integers("paged_attention: cu_seqlens", cu_seqlens, sequences + 1);
  step.contexts = host_integers("paged_attention: context_lens", context_lens, sequences);
  if (step.bounds[0] != 0 || !std::is_sorted(step.bounds.begin(), step.bounds.end()))
    throw std::invalid_argument("paged_attention: cu_seqlens: expected offsets that start at 0 and do not fall");
  block_tables.check("paged_attention: block_tables", DType::i32, {sequences, -1});
  if (block_tables.cuda || (block_tables.size(1) > 1 && block_tables.stride(1) != 1))
    throw std::invalid_argument("paged_attention: block_tables: expected contiguous rows on the CPU");
  step.tables = block_tables.ptr<int32_t>();
  step.table_stride = block_tables.stride(0);
  step.max_blocks = block_tables.size(1);
  step.block_size = block_size;
  step.num_blocks = num_blocks;
  step.group = group;
  step.window = window;
  step.max_fresh = max_fresh;
  step.max_tokens = max_tokens;
  step.max_cells = max_cells;
  cuda::Plan plan;
  {
    py::gil_scoped_release release;
    plan = cuda::make_plan(step);
  }
  py::bytes numbers(reinterpret_cast<const char*>(plan.numbers.data()), plan.numbers.size() * sizeof(int32_t));
  return py::make_tuple(numbers, plan.tokens, plan.cells, py::make_tuple(plan.items[0], plan.items[1], plan.items[2]));
}

inline void check_cache(const char* what, const Tensor& cache, const Tensor& like, int64_t kv_heads) {
  cache.check(what, like.dtype, {-1, kv_heads, -1, like.size(2)}).contiguous(what);
  if (reinterpret_cast<uintptr_t>(cache.data) % 16) throw std::invalid_argument(std::string(what) + ": expected 16-byte aligned memory");
}

inline void paged_attention_cuda(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& tables, const Tensor& plan,
                                 int64_t tokens, const std::vector<int64_t>& items, double scale, int64_t window, double softcap,
                                 const Tensor& partial_out, const Tensor& partial_sum, const Tensor& out, uintptr_t stream) {
  const char* op = "paged_attention";
  if ((q.dtype != DType::f32 && q.dtype != DType::bf16) || q.dim() != 3 || k_cache.dim() != 4 || q.size(2) % 8 || q.size(2) > 256 ||
      (q.size(2) > 1 && q.stride(2) != 1) || !k_cache.size(1) || q.size(1) % k_cache.size(1))
    throw std::invalid_argument("paged_attention: q: expected float32 or bfloat16 [T, heads, head_dim], head_dim a multiple of 8 up to 256, got " +
                                Tensor::describe(q.dtype, q.shape));
  check_cache("paged_attention: k_cache", k_cache, q, k_cache.size(1));
  v_cache.check("paged_attention: v_cache", q.dtype, k_cache.shape);
  check_cache("paged_attention: v_cache", v_cache, q, k_cache.size(1));
  cuda::PagedAttention a{};
  a.bf16 = q.dtype == DType::bf16;
  a.q = q.data, a.q_row_stride = q.stride(0), a.q_head_stride = q.stride(1);
  a.k_cache = k_cache.data, a.v_cache = v_cache.data;
  a.tables = tables.check(op, DType::i32, {-1, -1}).contiguous(op).ptr<int32_t>(), a.table_stride = tables.size(1);
  for (int i = 0; i < cuda::kItemSizes; ++i) a.num_items[i] = items.at(i);
  a.counts = plan.check("paged_attention: plan", DType::i32, {-1}).contiguous(op).ptr<int32_t>();
  if (plan.size(0) < 1 + cuda::kItemSizes + 4 * tokens) throw std::invalid_argument("paged_attention: plan: expected room for its tokens");
  a.tokens = a.counts + 1 + cuda::kItemSizes;
  a.items = a.tokens + 4 * tokens;
  a.num_tokens = tokens;
  a.heads = static_cast<int>(q.size(1)), a.kv_heads = static_cast<int>(k_cache.size(1));
  a.block_size = static_cast<int>(k_cache.size(2)), a.head_dim = static_cast<int>(q.size(2));
  a.window = static_cast<int>(window), a.scale = static_cast<float>(scale), a.softcap = static_cast<float>(softcap);
  a.partial_out = partial_out.check("paged_attention: partial_out", DType::f32, {-1, q.size(1), q.size(2)}).contiguous(op).ptr<float>();
  a.partial_sum = partial_sum.check("paged_attention: partial_sum", DType::f32, {partial_out.size(0), q.size(1), 2}).contiguous(op).ptr<float>();
  a.out = out.check("paged_attention: out", q.dtype, q.shape).contiguous("paged_attention: out").data;
  py::gil_scoped_release release;
  cuda::paged_attention(a, stream);
}

inline void store_kv_cuda(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots, uintptr_t stream) {
  if ((k.dtype != DType::f32 && k.dtype != DType::bf16) || k.dim() != 3 || (k.size(2) > 1 && (k.stride(2) != 1 || v.stride(2) != 1)))
    throw std::invalid_argument("store_kv: k: expected float32 or bfloat16 [T, kv_heads, head_dim], got " + Tensor::describe(k.dtype, k.shape));
  v.check("store_kv: v", k.dtype, k.shape);
  check_cache("store_kv: k_cache", k_cache, k, k.size(1));
  v_cache.check("store_kv: v_cache", k.dtype, k_cache.shape);
  check_cache("store_kv: v_cache", v_cache, k, k.size(1));
  slots.check("store_kv: slots", DType::i64, {-1}).contiguous("store_kv: slots");
  if (slots.size(0) > k.size(0)) throw std::invalid_argument("store_kv: expected at most one slot a row");
  cuda::StoreKV a{};
  a.bf16 = k.dtype == DType::bf16;
  a.k = k.data, a.v = v.data;
  a.k_row_stride = k.stride(0), a.k_head_stride = k.stride(1), a.v_row_stride = v.stride(0), a.v_head_stride = v.stride(1);
  a.slots = slots.ptr<int64_t>();
  a.rows = slots.size(0), a.capacity = k_cache.size(0) * k_cache.size(2);
  a.kv_heads = static_cast<int>(k.size(1)), a.head_dim = static_cast<int>(k.size(2)), a.block_size = static_cast<int>(k_cache.size(2));
  a.k_cache = k_cache.data, a.v_cache = v_cache.data;
  py::gil_scoped_release release;
  cuda::store_kv(a, stream);
}

inline void bind_attention_cuda(py::module_& m) {
  m.def("paged_plan", &paged_plan, py::arg("cu_seqlens"), py::arg("context_lens"), py::arg("block_tables"), py::arg("block_size"),
        py::arg("num_blocks"), py::arg("group"), py::arg("window"), py::arg("max_fresh"), py::arg("max_tokens") = 0, py::arg("max_cells") = 0,
        "The step on the host: (int32 bytes, tokens, cells, items of each size). Sequences with more than max_fresh new tokens are left out.");
  m.def("paged_attention_cuda", &paged_attention_cuda, py::arg("q"), py::arg("k_cache"), py::arg("v_cache"), py::arg("tables"), py::arg("plan"),
        py::arg("tokens"), py::arg("items"), py::arg("scale"), py::arg("window"), py::arg("softcap"), py::arg("partial_out"),
        py::arg("partial_sum"), py::arg("out"), py::arg("stream"), "Writes out's rows of the plan's tokens.");
  m.def("store_kv_cuda", &store_kv_cuda, py::arg("k"), py::arg("v"), py::arg("k_cache"), py::arg("v_cache"), py::arg("slots"), py::arg("stream"),
        "Copies rows into cache slots; a slot outside the cache is skipped.");
}

}  // namespace fa
