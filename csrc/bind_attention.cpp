// Checks, plan and dispatch of attention. The plan says which keys each query row reads and which rows share packed keys;
// the numbers do not depend on it (csrc/cpu/attention_tile.h).
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "calls.h"
#include "cpu/attention.h"
#ifdef HAS_CUDA_attention
#include <pybind11/stl.h>

#include "bind_attention_cuda.h"
#endif

namespace py = pybind11;

namespace fa {
namespace {

using namespace attention;

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument(what); }

View view(const std::string& what, const Tensor& t, DType type, int64_t rows, int64_t heads, int64_t head_dim) {
  t.check(what.c_str(), type, {rows, heads, head_dim});
  if (head_dim > 1 && t.stride(2) != 1) fail(what + ": expected contiguous elements in a head, got a stride of " + std::to_string(t.stride(2)));
  return {t.data, t.stride(0), t.stride(1)};
}

Problem problem(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, double scale, int64_t window, double softcap) {
  const std::string name = op;
  if ((q.dtype != DType::f32 && q.dtype != DType::bf16) || q.dim() != 3 || k.dim() != 3)
    fail(name + ": expected q, k and v in float32 or bfloat16 [T, heads, head_dim], got " + Tensor::describe(q.dtype, q.shape));
  const int64_t rows = q.size(0), heads = q.size(1), kv_heads = k.size(1), head_dim = q.size(2);
  if (!kv_heads || heads % kv_heads)
    fail(name + ": the query heads must be a multiple of the key heads, got " + std::to_string(heads) + " and " + std::to_string(kv_heads));
  return {q.dtype == DType::bf16,
          view(name + ": q", q, q.dtype, rows, heads, head_dim),
          view(name + ": k", k, q.dtype, rows, kv_heads, head_dim),
          view(name + ": v", v, q.dtype, rows, kv_heads, head_dim),
          heads,
          kv_heads,
          head_dim,
          static_cast<float>(scale),
          static_cast<float>(softcap),
          window};
}

std::vector<int64_t> integers(const std::string& what, const Tensor& t, int64_t count) {
  t.check(what.c_str(), DType::i32, {count}).contiguous(what.c_str());
  return {t.ptr<int32_t>(), t.ptr<int32_t>() + count};
}

std::vector<int64_t> offsets(const std::string& what, const Tensor& t, int64_t segments, int64_t rows) {
  auto bounds = integers(what, t, segments + 1);
  if (bounds[0] != 0 || !std::is_sorted(bounds.begin(), bounds.end()) || bounds.back() > rows)
    fail(what + ": expected offsets that start at 0, do not fall and end within " + std::to_string(rows) + " rows");
  return bounds;
}

// How many leading keys two sequences hold in the same memory, counting those that both have.
int64_t common_keys(const Forward& f, const QueryRun& a, const QueryRun& b) {
  int64_t common = 0;
  for (int i = 0; i < std::min(a.key_count, b.key_count); ++i) {
    const KeyRun &x = f.keys[a.key_first + i], &y = f.keys[b.key_first + i];
    if (x.begin != y.begin || x.k_origin != y.k_origin) break;
    common = x.begin + std::min(x.count, y.count);
    if (x.count != y.count) break;
  }
  return std::min({common, a.position + a.count, b.position + b.count}) / key_block * key_block;
}

// Cuts rows so that every thread has work, and joins adjacent runs that share leading keys.
int64_t rows_a_task(const Problem& p, int64_t tokens) {
  const int64_t group = p.heads / p.kv_heads, a_thread = tokens * p.kv_heads / std::max(1, omp_get_max_threads());
  return std::clamp<int64_t>(a_thread, 1, std::max<int64_t>(1, tile_rows / group));
}

void make_tasks(Forward& f, int64_t limit) {
  for (size_t i = 0; i < f.runs.size(); ++i) {
    const QueryRun& run = f.runs[i];
    if (!f.tasks.empty() && f.tasks.back().rows + run.count <= limit) {
      Task& task = f.tasks.back();
      const int64_t common = common_keys(f, f.runs[i - 1], run);
      if (common > 0 && (task.run_count == 1 || common >= task.shared)) {
        task.shared = task.run_count == 1 ? common : std::min(task.shared, common);
        task.run_count += 1;
        task.rows += run.count;
        continue;
      }
    }
    f.tasks.push_back({static_cast<int>(i), 1, 0, run.count});
  }
  auto cost = [&](const Task& t) { return t.rows * (f.runs[t.run_first].position + f.runs[t.run_first].count); };
  std::stable_sort(f.tasks.begin(), f.tasks.end(), [&](const Task& a, const Task& b) { return cost(a) > cost(b); });
}

void add_runs(Forward& f, int64_t row, int64_t count, int64_t position, int key_first, int64_t limit) {
  const int key_count = static_cast<int>(f.keys.size()) - key_first;
  for (int64_t n = 0; n < count; n += limit) f.runs.push_back({row + n, std::min(limit, count - n), position + n, key_first, key_count});
}

struct Tree {
  std::vector<TreeSegment> segments;  // parents first; only a root may be empty
  int64_t rows;
};

// Reads and checks the tree. An empty segment is its parent. An only child whose rows go on from its parent's is one segment
// with it, so a conversation cut into turns, or a chain of single tokens, runs as one sequence.
Tree read_tree(const std::string& op, const Tensor& cu_seqlens, const Tensor& parent, int64_t rows) {
  const int64_t count = parent.dim() == 1 ? parent.size(0) : -1;
  const auto bounds = offsets(op + ": cu_seqlens", cu_seqlens, count, rows), parents = integers(op + ": parent", parent, count);
  std::vector<int64_t> holder(count), children(count), place(count);  // the segment with tokens that s ends in; its index in the result
  for (int64_t s = 0; s < count; ++s) {
    const int64_t p = parents[s];
    if (p < -1 || p >= s) fail(op + ": parent: segment " + std::to_string(s) + " must continue an earlier one or -1, got " + std::to_string(p));
    const bool own = p < 0 || bounds[s + 1] > bounds[s];
    holder[s] = own ? s : holder[p];
    if (own && p >= 0) children[holder[p]] += 1;
  }
  Tree tree{{}, bounds.back()};
  for (int64_t s = 0; s < count; ++s) {
    if (holder[s] != s) continue;
    const int64_t up = parents[s] < 0 ? -1 : holder[parents[s]], tokens = bounds[s + 1] - bounds[s];
    TreeSegment* last = up < 0 ? nullptr : &tree.segments[place[up]];
    if (last && children[up] == 1 && last->row + last->count == bounds[s]) {
      last->count += tokens;
      place[s] = place[up];
      continue;
    }
    place[s] = static_cast<int64_t>(tree.segments.size());
    tree.segments.push_back({bounds[s], tokens, last ? last->position + last->count : 0, up < 0 ? -1 : static_cast<int>(place[up])});
  }
  return tree;
}

void plan_tree(Forward& f, const Tree& tree) {
  const Problem& p = f.p;
  const int64_t limit = rows_a_task(p, tree.rows);
  std::vector<std::pair<int, int>> path;  // of each segment: its key runs
  for (const TreeSegment& s : tree.segments) {
    const int first = static_cast<int>(f.keys.size());
    if (s.parent >= 0)
      for (int i = path[s.parent].first; i < path[s.parent].second; ++i) f.keys.push_back(KeyRun(f.keys[i]));
    if (s.count) {
      const int64_t k = s.row * p.k.row_stride, v = s.row * p.v.row_stride;
      KeyRun* last = static_cast<int>(f.keys.size()) > first ? &f.keys.back() : nullptr;
      if (last && last->k_origin + last->count * p.k.row_stride == k && last->v_origin + last->count * p.v.row_stride == v)
        last->count += s.count;  // the first child's rows go on from its parent's
      else
        f.keys.push_back({s.position, s.count, k, v});
      add_runs(f, s.row, s.count, s.position, first, limit);
    }
    path.push_back({first, static_cast<int>(f.keys.size())});
  }
  make_tasks(f, limit);
}

std::vector<std::vector<TreeSegment>> split_roots(const Tree& tree) {
  std::vector<std::vector<TreeSegment>> trees;
  std::vector<std::pair<int, int>> place;  // of each segment: tree, index in it
  for (const TreeSegment& s : tree.segments) {
    const bool root = s.parent < 0;
    if (root) trees.emplace_back();
    const int t = root ? static_cast<int>(trees.size()) - 1 : place[s.parent].first;
    place.push_back({t, static_cast<int>(trees[t].size())});
    trees[t].push_back({s.row, s.count, s.position, root ? -1 : place[s.parent].second});
  }
  return trees;
}

void tree_attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, const Tensor& parent, double scale,
                            int64_t window, double softcap, const Tensor& out, const Tensor& lse) {
  const std::string op = "tree_attention";
  Forward f{problem("tree_attention", q, k, v, scale, window, softcap), {}, {}, {}, nullptr, nullptr};
  f.out = out.check("tree_attention: out", q.dtype, q.shape).contiguous("tree_attention: out").data;
  f.lse = lse.check("tree_attention: lse", DType::f32, {q.size(0), q.size(1)}).contiguous("tree_attention: lse").ptr<float>();
  const Tree tree = read_tree(op, cu_seqlens, parent, q.size(0));
  py::gil_scoped_release release;
  plan_tree(f, tree);
  FA_CALL(attention_forward, f);
}

void tree_attention_backward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens, const Tensor& parent, double scale,
                             int64_t window, double softcap, const Tensor& out, const Tensor& grad, const Tensor& lse, const Tensor& dq,
                             const Tensor& dk, const Tensor& dv) {
  const char* op = "tree_attention backward";
  Backward b{};
  b.p = problem(op, q, k, v, scale, window, softcap);
  b.out = out.check(op, q.dtype, q.shape).contiguous(op).data;
  b.grad = grad.check(op, q.dtype, q.shape).contiguous(op).data;
  b.lse = lse.check(op, DType::f32, {q.size(0), q.size(1)}).contiguous(op).ptr<float>();
  b.dq = dq.check(op, DType::f32, q.shape).contiguous(op).ptr<float>();
  b.dk = dk.check(op, q.dtype, k.shape).contiguous(op).data;
  b.dv = dv.check(op, q.dtype, k.shape).contiguous(op).data;
  const Tree tree = read_tree(op, cu_seqlens, parent, q.size(0));
  py::gil_scoped_release release;
  std::vector<float> delta(q.size(0) * q.size(1));
  b.delta = delta.data();
  b.trees = split_roots(tree);
  FA_CALL(attention_backward, b);
}

struct Cache {
  int64_t blocks, block_size;
};

Cache check_cache(const Problem& p, const Tensor& k_cache, const Tensor& v_cache) {
  for (const Tensor* t : {&k_cache, &v_cache})
    t->check("paged_attention: cache", p.bf16 ? DType::bf16 : DType::f32, {-1, p.kv_heads, -1, p.head_dim}).contiguous("paged_attention: cache");
  if (k_cache.shape != v_cache.shape) fail("paged_attention: the caches of keys and values must have one shape");
  return {k_cache.size(0), k_cache.size(2)};
}

void store(const Problem& p, const Tensor& slots, const Tensor& k_cache, const Tensor& v_cache, Cache cache) {
  slots.check("paged_attention: slots", DType::i64, {-1}).contiguous("paged_attention: slots");
  const int64_t* slot = slots.ptr<int64_t>();
  for (int64_t i = 0; i < slots.size(0); ++i)
    if (slot[i] >= cache.blocks * cache.block_size)
      fail("paged_attention: slots must be < " + std::to_string(cache.blocks * cache.block_size) + ", got " + std::to_string(slot[i]));
  FA_CALL(store_kv, p, slot, slots.size(0), cache.block_size, k_cache.data, v_cache.data);
}

void store_kv(const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots) {
  const Problem p = problem("store_kv", k, k, v, 1.0, 0, 0.0);
  if (slots.dim() != 1 || slots.size(0) > k.size(0)) fail("store_kv: expected at most one slot a row");
  store(p, slots, k_cache, v_cache, check_cache(p, k_cache, v_cache));
}

// A sequence's blocks as key runs, from the first that the window reaches.
void plan_sequence(Forward& f, const int32_t* table, int64_t max_blocks, int64_t context, int64_t first, Cache cache) {
  const Problem& p = f.p;
  if (context > max_blocks * cache.block_size)
    fail("paged_attention: a context of " + std::to_string(context) + " keys needs more than the " + std::to_string(max_blocks) + " blocks of its table");
  for (int64_t at = first / cache.block_size * cache.block_size; at < context; at += cache.block_size) {
    const int64_t block = table[at / cache.block_size];
    if (block < 0 || block >= cache.blocks)
      fail("paged_attention: block_tables must be in [0, " + std::to_string(cache.blocks) + "), got " + std::to_string(block));
    const int64_t origin = block * p.kv_heads * cache.block_size * p.head_dim;
    f.keys.push_back({at, std::min(cache.block_size, context - at), origin, origin});
  }
}

void plan_paged(Forward& f, const std::vector<int64_t>& bounds, const std::vector<int64_t>& contexts, const Tensor& block_tables, Cache cache) {
  const Problem& p = f.p;
  const int64_t limit = rows_a_task(p, bounds.back());
  const int32_t* tables = block_tables.ptr<int32_t>();
  for (size_t s = 0; s < contexts.size(); ++s) {
    const int64_t fresh = bounds[s + 1] - bounds[s], position = contexts[s] - fresh;
    if (!fresh) continue;
    if (position < 0) fail("paged_attention: sequence " + std::to_string(s) + " has more new tokens than its context_lens");
    const int64_t window_start = p.window ? std::max<int64_t>(0, position - p.window + 1) / key_block * key_block : 0;
    const int key_first = static_cast<int>(f.keys.size());
    plan_sequence(f, tables + s * block_tables.stride(0), block_tables.size(1), contexts[s], window_start, cache);
    add_runs(f, bounds[s], fresh, position, key_first, limit);
  }
  make_tasks(f, limit);
}

void paged_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& slots,
                     const Tensor& cu_seqlens, const Tensor& context_lens, const Tensor& block_tables, double scale, int64_t window,
                     double softcap, const Tensor& out) {
  py::gil_scoped_release release;
  attend_paged(q, k, v, {k_cache, v_cache, slots, cu_seqlens, context_lens, block_tables, scale, window, softcap}, out);
}

}  // namespace

void attend_paged(const Tensor& q, const Tensor& k, const Tensor& v, const PagedStep& step, const Tensor& out) {
  Forward f{problem("paged_attention", q, k, v, step.scale, step.window, step.softcap), {}, {}, {}, nullptr, nullptr};
  const Cache cache = check_cache(f.p, step.k_cache, step.v_cache);
  if (step.context_lens.dim() != 1) fail("paged_attention: context_lens: expected int32 [S], got " + Tensor::describe(step.context_lens.dtype, step.context_lens.shape));
  const int64_t sequences = step.context_lens.size(0);
  const auto bounds = offsets("paged_attention: cu_seqlens", step.cu_seqlens, sequences, q.size(0));
  const auto contexts = integers("paged_attention: context_lens", step.context_lens, sequences);
  step.block_tables.check("paged_attention: block_tables", DType::i32, {sequences, -1});
  if (step.block_tables.size(1) > 1 && step.block_tables.stride(1) != 1) fail("paged_attention: block_tables: expected contiguous rows");
  if (step.slots.dim() != 1 || step.slots.size(0) > q.size(0)) fail("paged_attention: expected at most one slot a row");
  f.out = out.check("paged_attention: out", q.dtype, q.shape).contiguous("paged_attention: out").data;
  const int64_t row = f.p.heads * f.p.head_dim * (f.p.bf16 ? 2 : 4);
  std::memset(static_cast<char*>(f.out) + bounds.back() * row, 0, (q.size(0) - bounds.back()) * row);
  store(f.p, step.slots, step.k_cache, step.v_cache, cache);
  const int64_t head = cache.block_size * f.p.head_dim;
  f.p.k = {step.k_cache.data, f.p.head_dim, head};
  f.p.v = {step.v_cache.data, f.p.head_dim, head};
  plan_paged(f, bounds, contexts, step.block_tables, cache);
  FA_CALL(attention_forward, f);
}

void bind_attention(py::module_& m) {
  m.def("tree_attention_forward", &tree_attention_forward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cu_seqlens"), py::arg("parent"),
        py::arg("scale"), py::arg("window"), py::arg("softcap"), py::arg("out"), py::arg("lse"),
        "Writes out and lse of the layout's rows; window 0 and softcap 0 mean none.");
  m.def("tree_attention_backward", &tree_attention_backward, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("cu_seqlens"), py::arg("parent"),
        py::arg("scale"), py::arg("window"), py::arg("softcap"), py::arg("out"), py::arg("grad"), py::arg("lse"), py::arg("dq"), py::arg("dk"),
        py::arg("dv"), "Adds to dq (fp32, zero at first) and writes dk, dv of the layout's rows.");
  m.def("paged_attention", &paged_attention, py::arg("q"), py::arg("k"), py::arg("v"), py::arg("k_cache"), py::arg("v_cache"), py::arg("slots"),
        py::arg("cu_seqlens"), py::arg("context_lens"), py::arg("block_tables"), py::arg("scale"), py::arg("window"), py::arg("softcap"),
        py::arg("out"), "Stores k and v by slot, then attends over the blocks of each sequence; rows past the sequences' are zero.");
  m.def("store_kv", &store_kv, py::arg("k"), py::arg("v"), py::arg("k_cache"), py::arg("v_cache"), py::arg("slots"),
        "Copies rows into cache slots; a negative slot is skipped.");
#ifdef HAS_CUDA_attention
  bind_attention_cuda(m);
#endif
}

}  // namespace fa
