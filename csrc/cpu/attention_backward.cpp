// dq, dk, dv of tree attention from the saved log-sum-exp.
//   P = exp(S - lse)   dV = P^T dO   dS = P (dO V^T - delta) (1 - (S/cap)^2)   dQ = dS K   dK = dS^T Q   delta = rowsum(dO O)
// One task = one (tree, kv head), so every sum is a fixed sequence of additions by one thread: deterministic for any
// number of threads. Key tiles of at most 64 keys of one segment meet query tiles of the segment and its descendants.
// Five products a pair of tiles; q, k, v, out and grad are read as they are and summed in fp32.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "cpu/attention_tile.h"

namespace fa::FA_ISA {
namespace {

using namespace attention;

struct Tile {  // one thread's scratch
  float *kt, *k, *vt, *dk, *dv;        // keys: [D][64], [64][dp], [D][64], [64][dp], [64][dp]
  float *q, *grad, *dq, *p, *ds;       // queries: [rows][dp] x 3, [rows][64] x 2
};

struct Keys {  // a key tile
  int64_t row, count, position;
};

struct Queries {  // a query tile
  int64_t row, count, position;
  bool causal;  // in the keys' own segment
};

template <typename T>
void load_keys(const Problem& p, int64_t kv_head, Keys keys, int64_t dp, Tile& t) {
  const T* k = static_cast<const T*>(p.k.data) + kv_head * p.k.head_stride + keys.row * p.k.row_stride;
  const T* v = static_cast<const T*>(p.v.data) + kv_head * p.v.head_stride + keys.row * p.v.row_stride;
  pack_transposed(k, p.k.row_stride, keys.count, p.head_dim, 0, t.kt);
  pack_transposed(v, p.v.row_stride, keys.count, p.head_dim, 0, t.vt);
  pack_rows(k, p.k.row_stride, keys.count, p.head_dim, dp, 1.0f, t.k);
  std::fill(t.dk, t.dk + keys.count * dp, 0.0f);
  std::fill(t.dv, t.dv + keys.count * dp, 0.0f);
}

// The keys [low, high) of the tile that a query sees.
void visible(const Problem& p, Keys keys, int64_t position, int64_t* low, int64_t* high) {
  *low = p.window ? std::clamp<int64_t>(position - p.window + 1 - keys.position, 0, keys.count) : 0;
  *high = std::clamp<int64_t>(position + 1 - keys.position, 0, keys.count);
}

// One row: scores and dO V^T → P and dS, zero where masked.
void row_gradient(const Problem& p, int64_t low, int64_t high, int64_t columns, float lse, float delta, float* s, float* ds) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  for (int64_t c = 0; c < columns; c += W) {
    vf x = load(s + c), slope = splat(1.0f);
    if (p.softcap != 0.0f) {
      const vf tanh = math::tanh<vu>(x * (1.0f / p.softcap));
      x = tanh * p.softcap;
      slope = 1.0f - tanh * tanh;
    }
    const vi at = lane + static_cast<int32_t>(c);
    const vi seen = (at >= static_cast<int32_t>(low)) & (at < static_cast<int32_t>(high));
    const vf prob = seen ? math::exp<vu>(x - lse) : vf{};
    store(s + c, prob);
    store(ds + c, seen ? prob * (load(ds + c) - delta) * slope : vf{});
  }
}

template <typename T>
void load_queries(const Backward& call, int64_t kv_head, Queries queries, int64_t dp, Tile& t) {
  const Problem& p = call.p;
  const int64_t group = p.heads / p.kv_heads, head = kv_head * group;
  for (int64_t n = 0; n < queries.count; ++n) {
    const int64_t row = queries.row + n, cell = (row * p.heads + head) * p.head_dim;
    const T* q = static_cast<const T*>(p.q.data) + row * p.q.row_stride + head * p.q.head_stride;
    pack_rows(q, p.q.head_stride, group, p.head_dim, dp, p.scale, t.q + n * group * dp);
    pack_rows(static_cast<const T*>(call.grad) + cell, p.head_dim, group, p.head_dim, dp, 1.0f, t.grad + n * group * dp);
    pack_rows(call.dq + cell, p.head_dim, group, p.head_dim, dp, 1.0f, t.dq + n * group * dp);
  }
}

void store_queries(const Backward& call, int64_t kv_head, Queries queries, int64_t dp, const Tile& t) {
  const int64_t group = call.p.heads / call.p.kv_heads;
  for (int64_t r = 0; r < queries.count * group; ++r) {
    const int64_t cell = (queries.row + r / group) * call.p.heads + kv_head * group + r % group;
    std::copy_n(t.dq + r * dp, call.p.head_dim, call.dq + cell * call.p.head_dim);
  }
}

template <typename T>
void tile_pair(const Backward& call, int64_t kv_head, Keys keys, Queries queries, int64_t dp, Tile& t) {
  const Problem& p = call.p;
  const int64_t group = p.heads / p.kv_heads, rows = queries.count * group;
  load_queries<T>(call, kv_head, queries, dp, t);
  for (int64_t r = 0; r < rows; r += tile_r) {
    const int n = static_cast<int>(std::min<int64_t>(tile_r, rows - r));
    int64_t low[tile_r], high[tile_r], seen = 0;
    for (int i = 0; i < n; ++i) {
      visible(p, keys, queries.position + (r + i) / group, low + i, high + i);
      seen = std::max(seen, high[i]);
    }
    const int64_t columns = (seen + tile_vectors * W - 1) / (tile_vectors * W) * (tile_vectors * W);
    float *s = t.p + r * key_block, *ds = t.ds + r * key_block;
    scores(n, t.q + r * dp, dp, t.kt, p.head_dim, columns, s);
    scores(n, t.grad + r * dp, dp, t.vt, p.head_dim, columns, ds);
    for (int i = 0; i < n; ++i) {
      const int64_t cell = (queries.row + (r + i) / group) * p.heads + kv_head * group + (r + i) % group;
      row_gradient(p, low[i], high[i], columns, call.lse[cell], call.delta[cell], s + i * key_block, ds + i * key_block);
      std::fill(s + i * key_block + columns, s + (i + 1) * key_block, 0.0f);
      std::fill(ds + i * key_block + columns, ds + (i + 1) * key_block, 0.0f);
    }
    accumulate(n, t.dq + r * dp, dp, nullptr, ds, key_block, 1, t.k, dp, seen, dp);
  }
  store_queries(call, kv_head, queries, dp, t);
  for (int64_t j = 0; j < keys.count; j += tile_r) {
    const int n = static_cast<int>(std::min<int64_t>(tile_r, keys.count - j));
    // in the keys' own segment earlier queries see none of these keys
    const int64_t first = queries.causal ? std::clamp<int64_t>(keys.position + j - queries.position, 0, queries.count) * group : 0;
    accumulate(n, t.dv + j * dp, dp, nullptr, t.p + first * key_block + j, 1, key_block, t.grad + first * dp, dp, rows - first, dp);
    accumulate(n, t.dk + j * dp, dp, nullptr, t.ds + first * key_block + j, 1, key_block, t.q + first * dp, dp, rows - first, dp);
  }
}

template <typename T>
void store_keys(const Backward& call, int64_t kv_head, Keys keys, int64_t dp, const Tile& t) {
  const Problem& p = call.p;
  for (int64_t j = 0; j < keys.count; ++j) {
    const int64_t cell = ((keys.row + j) * p.kv_heads + kv_head) * p.head_dim;
    for (int64_t d = 0; d < p.head_dim; ++d) {
      from_float(static_cast<T*>(call.dk) + cell + d, t.dk[j * dp + d]);
      from_float(static_cast<T*>(call.dv) + cell + d, t.dv[j * dp + d]);
    }
  }
}

// delta = rowsum(dO O) of a tree's rows and this kv head's query heads.
template <typename T>
void deltas(const Backward& call, const std::vector<TreeSegment>& tree, int64_t kv_head) {
  const Problem& p = call.p;
  const int64_t group = p.heads / p.kv_heads;
  for (const TreeSegment& s : tree)
    for (int64_t r = 0; r < s.count * group; ++r) {
      const int64_t cell = (s.row + r / group) * p.heads + kv_head * group + r % group;
      const T *out = static_cast<const T*>(call.out) + cell * p.head_dim, *grad = static_cast<const T*>(call.grad) + cell * p.head_dim;
      vf total{};
      int64_t d = 0;
      for (; d + W <= p.head_dim; d += W) total += load(out + d) * load(grad + d);
      float sum = reduce_add(total);
      for (; d < p.head_dim; ++d) sum += to_float(out[d]) * to_float(grad[d]);
      call.delta[cell] = sum;
    }
}

template <typename T>
void key_tile(const Backward& call, const std::vector<TreeSegment>& tree, const std::vector<int>& readers, int own, Keys keys, int64_t kv_head,
              int64_t dp, Tile& t) {
  const Problem& p = call.p;
  const int64_t tokens = std::max<int64_t>(1, key_block / (p.heads / p.kv_heads));
  load_keys<T>(p, kv_head, keys, dp, t);
  for (int reader : readers) {
    const TreeSegment& s = tree[reader];
    const int64_t last = p.window ? keys.position + keys.count + p.window - 1 - s.position : s.count;  // queries past it see none
    for (int64_t n = reader == own ? keys.position - s.position : 0; n < std::min(s.count, last); n += tokens) {
      const int64_t count = std::min(tokens, std::min(s.count, last) - n);
      tile_pair<T>(call, kv_head, keys, {s.row + n, count, s.position + n, reader == own}, dp, t);
    }
  }
  store_keys<T>(call, kv_head, keys, dp, t);
}

template <typename T>
void run_tree(const Backward& call, const std::vector<TreeSegment>& tree, int64_t kv_head, int64_t dp, Tile& t) {
  deltas<T>(call, tree, kv_head);
  std::vector<int> readers;
  std::vector<char> below(tree.size());
  for (size_t own = 0; own < tree.size(); ++own) {
    if (!tree[own].count) continue;
    readers.clear();
    for (size_t s = own; s < tree.size(); ++s) {  // parents come first
      below[s] = s == own || (s > own && tree[s].parent >= static_cast<int>(own) && below[tree[s].parent]);
      if (below[s] && tree[s].count) readers.push_back(static_cast<int>(s));
    }
    for (int64_t n = 0; n < tree[own].count; n += key_block) {
      const Keys keys{tree[own].row + n, std::min(key_block, tree[own].count - n), tree[own].position + n};
      key_tile<T>(call, tree, readers, static_cast<int>(own), keys, kv_head, dp, t);
    }
  }
  for (const TreeSegment& s : tree)  // S was scaled through q
    for (int64_t n = 0; n < s.count; ++n) {
      const int64_t group = call.p.heads / call.p.kv_heads, cell = (s.row + n) * call.p.heads + kv_head * group;
      for (int64_t d = 0; d < group * call.p.head_dim; ++d) call.dq[cell * call.p.head_dim + d] *= call.p.scale;
    }
}

// Largest first, so that no thread starts the longest tree last.
std::vector<int> by_cost(const std::vector<std::vector<TreeSegment>>& trees) {
  std::vector<double> cost;
  for (const auto& tree : trees) {
    double sum = 0;
    for (const TreeSegment& s : tree) sum += static_cast<double>(s.count) * (2 * s.position + s.count);
    cost.push_back(sum);
  }
  std::vector<int> order(trees.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return cost[a] > cost[b]; });
  return order;
}

template <typename T>
void run(const Backward& call) {
  const Problem& p = call.p;
  const int64_t dp = padded(p.head_dim), rows = std::max(key_block, p.heads / p.kv_heads);
  const int64_t tasks = static_cast<int64_t>(call.trees.size()) * p.kv_heads;
  const std::vector<int> order = by_cost(call.trees);
  const int64_t sizes[] = {p.head_dim * key_block, key_block * dp, p.head_dim * key_block, key_block * dp, key_block * dp,
                           rows * dp,              rows * dp,      rows * dp,              rows * key_block, rows * key_block};
  int64_t floats = 0;
  for (int64_t size : sizes) floats += Scratch::round(size);
#pragma omp parallel
  {
    Scratch scratch(floats);
    Tile t;
    float** parts[] = {&t.kt, &t.k, &t.vt, &t.dk, &t.dv, &t.q, &t.grad, &t.dq, &t.p, &t.ds};
    for (int i = 0; i < 10; ++i) *parts[i] = scratch.take(sizes[i]);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tasks; ++i) run_tree<T>(call, call.trees[order[i / p.kv_heads]], i % p.kv_heads, dp, t);
  }
}

}  // namespace

void attention_backward(const Backward& call) {
  if (!call.p.bf16)
    run<float>(call);
  else
    run<uint16_t>(call);
}

}  // namespace fa::FA_ISA
