// out = softmax(cap(scale q kT)) v over key runs: the tree's forward, prefill and decode.
//
// One task = one (Task, kv head): its rows are (query, head of the group). For each block of 64 logical positions K is
// packed transposed and V as rows, fp32, once for all rows that see it; each row keeps its own online softmax (m, l, O).
// A block no key of which a row sees leaves the row's m, l and O as they are, to the bit.
// Bytes: K and V once a task (a shared prefix once for all its sequences), q and out once.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/attention_tile.h"

namespace fa::FA_ISA {
namespace {

using namespace attention;

constexpr float inf = std::numeric_limits<float>::infinity();

struct Row {
  int64_t position;  // logical
  int64_t first;     // first key it sees
};

struct Values {  // consecutive keys' values, one row behind the other
  const float* rows;
  int64_t count;
};

struct Tile {  // one thread's scratch
  float *q, *o, *m, *l, *kt, *v, *s;
  std::vector<Row> rows;
  std::vector<Values> values;  // of the block: where they lie in the cache, or packed
};

// Rows of the tile, a key block and how much of it exists.
struct Block {
  int64_t begin, end;  // logical positions that are packed; end - begin <= key_block
};

// What a thread reads after a sequence's last key. The packing loops ask for the block after this one: a cache's blocks are
// scattered, so no hardware stream finds them.
struct Upcoming {
  const KeyRun *begin, *end;  // equal: nothing is known
  int64_t kv_head;
};

template <typename T>
struct Ahead {
  const T *k, *v;
};

template <typename T>
Ahead<T> ahead(const Problem& p, const KeyRun* run, const KeyRun* end, int64_t kv_head, const Upcoming& upcoming) {
  const int64_t step = std::max<int64_t>(1, key_block / run->count), left = end - run;
  if (step >= left) {
    run = upcoming.begin + (step - left), kv_head = upcoming.kv_head;
    if (step - left >= upcoming.end - upcoming.begin) return {nullptr, nullptr};
  } else {
    run += step;
  }
  return {static_cast<const T*>(p.k.data) + kv_head * p.k.head_stride + run->k_origin,
          static_cast<const T*>(p.v.data) + kv_head * p.v.head_stride + run->v_origin};
}

// Whether a row of values can be read as it lies in memory. Worth it where few rows read them: a packed block has no seams.
template <typename T>
bool reads_in_place(const Problem& p, int64_t rows, int64_t dp) {
  return sizeof(T) == sizeof(float) && p.head_dim == dp && p.v.row_stride == dp && rows <= tile_r;
}

// rows: of the tile that the block is for.
template <typename T>
void pack_block(const Problem& p, const KeyRun* runs, int count, int64_t kv_head, Block block, int64_t rows, int64_t dp, const Upcoming& upcoming,
                Tile& t) {
  const T* k = static_cast<const T*>(p.k.data) + kv_head * p.k.head_stride;
  const T* v = static_cast<const T*>(p.v.data) + kv_head * p.v.head_stride;
  const KeyRun* run = std::upper_bound(runs, runs + count, block.begin, [](int64_t at, const KeyRun& r) { return at < r.begin + r.count; });
  const bool in_place = reads_in_place<T>(p, rows, dp);
  t.values.clear();
  if (!in_place) t.values.push_back({t.v, block.end - block.begin});
  for (; run != runs + count && run->begin < block.end; ++run) {
    const int64_t from = std::max(block.begin, run->begin), to = std::min(block.end, run->begin + run->count);
    const int64_t skip = from - run->begin, at = from - block.begin;
    const Ahead<T> next = run->count < key_block ? ahead<T>(p, run, runs + count, kv_head, upcoming) : Ahead<T>{nullptr, nullptr};
    pack_transposed(k + run->k_origin + skip * p.k.row_stride, p.k.row_stride, to - from, p.head_dim, at, t.kt, next.k);
    const T* values = v + run->v_origin + skip * p.v.row_stride;
    if (!in_place) {
      pack_rows(values, p.v.row_stride, to - from, p.head_dim, dp, 1.0f, t.v + at * dp, next.v);
    } else if constexpr (sizeof(T) == sizeof(float)) {
      t.values.push_back({values, to - from});
      if (next.v) prefetch(next.v, (to - from) * dp);
    }
  }
}

// One row's scores of a block → probabilities, its m and l; returns the factor for its O so far.
float softmax_row(const Problem& p, const Row& row, Block block, int64_t columns, float* s, float* m, float* l) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  const int32_t low = static_cast<int32_t>(std::clamp<int64_t>(row.first - block.begin, 0, key_block));
  const int32_t high = static_cast<int32_t>(std::clamp<int64_t>(row.position + 1 - block.begin, 0, block.end - block.begin));
  if (low >= high) {
    std::fill(s, s + columns, 0.0f);
    return 1.0f;
  }
  vf top = splat(-inf);
  if (low == 0 && high == columns && p.softcap == 0.0f) {  // nothing to mask, as in all of a sequence's blocks but the last
    for (int64_t c = 0; c < columns; c += W) top = max(top, load(s + c));
  } else {
    for (int64_t c = 0; c < columns; c += W) {
      vf x = load(s + c);
      if (p.softcap != 0.0f) x = math::tanh<vu>(x * (1.0f / p.softcap)) * p.softcap;
      const vi at = lane + static_cast<int32_t>(c);
      x = (at >= low) & (at < high) ? x : splat(-inf);
      store(s + c, x);
      top = max(top, x);
    }
  }
  const float before = *m, now = std::max(before, reduce_max(top));
  vf total[key_block / W];  // not zeroed as a whole: that becomes a string store, an eighth of the kernel where heads are small
  for (int64_t c = 0; c < columns; c += W) {
    const vf x = math::exp<vu>(load(s + c) - now);
    store(s + c, x);
    total[c / W] = x;
  }
  for (int64_t i = columns / W; i < key_block / W; ++i) total[i] = vf{};
  for (int step = key_block / W / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) total[i] = total[i] + total[i + step];
  const float alpha = math::exp<uint32_t>(before - now);
  *l = *l * alpha + reduce_add(total[0]);
  *m = now;
  return alpha;
}

// Rows [begin, end) of the tile take one packed block.
void attend_block(const Problem& p, Tile& t, int64_t begin, int64_t end, Block block, int64_t dp) {
  float alpha[tile_r];
  for (int64_t r = begin; r < end; r += tile_r) {
    const int rows = static_cast<int>(std::min<int64_t>(tile_r, end - r));
    int64_t seen = 0, first = block.end;
    for (int i = 0; i < rows; ++i) {
      seen = std::max(seen, std::min(block.end, t.rows[r + i].position + 1) - block.begin);
      first = std::min(first, t.rows[r + i].first);
    }
    if (seen <= 0 || first >= block.end) continue;
    const int64_t columns = padded(seen);
    scores(rows, t.q + r * dp, dp, t.kt, p.head_dim, columns, t.s);
    for (int i = 0; i < rows; ++i) alpha[i] = softmax_row(p, t.rows[r + i], block, columns, t.s + i * key_block, t.m + r + i, t.l + r + i);
    const float* factor = alpha;  // once
    int64_t at = 0;
    for (const Values& part : t.values) {
      if (at >= seen) break;
      accumulate(rows, t.o + r * dp, dp, factor, t.s + at, key_block, 1, part.rows, dp, std::min(part.count, seen - at), dp);
      at += part.count;
      factor = nullptr;
    }
  }
}

template <typename T>
void load_rows(const Forward& call, const Task& task, int64_t kv_head, int64_t dp, Tile& t) {
  const Problem& p = call.p;
  const int64_t group = p.heads / p.kv_heads;
  t.rows.clear();
  float* q = t.q;
  for (int i = 0; i < task.run_count; ++i) {
    const QueryRun& run = call.runs[task.run_first + i];
    for (int64_t n = 0; n < run.count; ++n) {
      const int64_t at = run.position + n;
      const T* row = static_cast<const T*>(p.q.data) + (run.row + n) * p.q.row_stride + kv_head * group * p.q.head_stride;
      pack_rows(row, p.q.head_stride, group, p.head_dim, dp, p.scale, q);
      q += group * dp;
      t.rows.insert(t.rows.end(), group, Row{at, p.window ? std::max<int64_t>(0, at - p.window + 1) : 0});
    }
  }
  const int64_t rows = static_cast<int64_t>(t.rows.size());
  std::fill(t.o, t.o + rows * dp, 0.0f);
  std::fill(t.m, t.m + rows, -inf);
  std::fill(t.l, t.l + rows, 0.0f);
}

template <typename T>
void write_rows(const Forward& call, const Task& task, int64_t kv_head, int64_t dp, const Tile& t) {
  const Problem& p = call.p;
  const int64_t group = p.heads / p.kv_heads;
  int64_t r = 0;
  for (int i = 0; i < task.run_count; ++i) {
    const QueryRun& run = call.runs[task.run_first + i];
    for (int64_t n = 0; n < run.count * group; ++n, ++r) {
      const int64_t cell = (run.row + n / group) * p.heads + kv_head * group + n % group;
      T* out = static_cast<T*>(call.out) + cell * p.head_dim;
      const float factor = 1.0f / t.l[r];  // a row sees at least itself: l >= exp(0)
      const float* o = t.o + r * dp;
      int64_t d = 0;
      for (; d + W <= p.head_dim; d += W) store(out + d, load(o + d) * factor);
      for (; d < p.head_dim; ++d) from_float(out + d, o[d] * factor);
      if (call.lse) call.lse[cell] = t.m[r] + std::log(t.l[r]);
    }
  }
}

// A run's keys from a logical position on, for a task's head.
Upcoming keys_from(const Forward& call, const QueryRun& run, int64_t position, int64_t kv_head) {
  const KeyRun *begin = call.keys.data() + run.key_first, *end = begin + run.key_count;
  while (begin != end && begin->begin + begin->count <= position) ++begin;
  return {begin, end, kv_head};
}

template <typename T>
void run_task(const Forward& call, const Task& task, int64_t kv_head, const Upcoming& after, Tile& t) {
  const Problem& p = call.p;
  const int64_t dp = padded(p.head_dim), group = p.heads / p.kv_heads;
  load_rows<T>(call, task, kv_head, dp, t);
  const QueryRun* runs = call.runs.data() + task.run_first;
  const int64_t rows = static_cast<int64_t>(t.rows.size());
  int64_t first = t.rows[0].first;
  for (const Row& row : t.rows) first = std::min(first, row.first);
  for (int64_t b = first / key_block * key_block; b < task.shared; b += key_block) {
    pack_block<T>(p, call.keys.data() + runs[0].key_first, runs[0].key_count, kv_head, {b, b + key_block}, rows, dp, after, t);
    attend_block(p, t, 0, rows, {b, b + key_block}, dp);
  }
  int64_t r = 0;
  for (int i = 0; i < task.run_count; ++i) {
    const int64_t length = runs[i].position + runs[i].count, end = r + runs[i].count * group;
    const Upcoming next = i + 1 < task.run_count ? keys_from(call, runs[i + 1], task.shared, kv_head) : after;
    for (int64_t b = std::max(task.shared, t.rows[r].first / key_block * key_block); b < length; b += key_block) {
      const Block block{b, std::min(length, b + key_block)};
      pack_block<T>(p, call.keys.data() + runs[i].key_first, runs[i].key_count, kv_head, block, end - r, dp, next, t);
      attend_block(p, t, r, end, block, dp);
    }
    r = end;
  }
  write_rows<T>(call, task, kv_head, dp, t);
}

template <typename T>
void run(const Forward& call) {
  const Problem& p = call.p;
  const int64_t dp = padded(p.head_dim), group = p.heads / p.kv_heads, tasks = static_cast<int64_t>(call.tasks.size());
  int64_t rows = 0;
  for (const Task& task : call.tasks) rows = std::max(rows, task.rows * group);
  const int64_t sizes[] = {rows * dp, rows * dp, rows, rows, p.head_dim * key_block, key_block * dp, tile_r * key_block};
  int64_t floats = 0;
  for (int64_t size : sizes) floats += Scratch::round(size);
  const int64_t items = tasks * p.kv_heads, chunk = std::clamp<int64_t>(items / (16 * omp_get_max_threads()), 1, 4 * p.kv_heads);
#pragma omp parallel
  {
    Scratch scratch(floats);
    Tile t;
    float** parts[] = {&t.q, &t.o, &t.m, &t.l, &t.kt, &t.v, &t.s};
    for (int i = 0; i < 7; ++i) *parts[i] = scratch.take(sizes[i]);
#pragma omp for schedule(dynamic, chunk)
    for (int64_t i = 0; i < items; ++i) {
      const Task& next = call.tasks[(i + 1) / p.kv_heads % tasks];  // the same thread's, but at the end of a chunk
      run_task<T>(call, call.tasks[i / p.kv_heads], i % p.kv_heads, keys_from(call, call.runs[next.run_first], 0, (i + 1) % p.kv_heads), t);
    }
  }
}

}  // namespace

void attention_forward(const Forward& call) {
  if (call.tasks.empty()) return;
  if (!call.p.bf16)
    run<float>(call);
  else
    run<uint16_t>(call);
}

void store_kv(const Problem& p, const int64_t* slots, int64_t rows, int64_t block_size, void* k_cache, void* v_cache) {
  const int64_t bytes = p.bf16 ? 2 : 4, width = p.head_dim * bytes;
#pragma omp parallel for if (rows > 64)
  for (int64_t r = 0; r < rows; ++r) {
    if (slots[r] < 0) continue;
    const int64_t block = slots[r] / block_size, offset = slots[r] % block_size;
    for (int64_t h = 0; h < p.kv_heads; ++h) {
      const int64_t to = ((block * p.kv_heads + h) * block_size + offset) * width;
      std::memcpy(static_cast<char*>(k_cache) + to, static_cast<const char*>(p.k.data) + (r * p.k.row_stride + h * p.k.head_stride) * bytes, width);
      std::memcpy(static_cast<char*>(v_cache) + to, static_cast<const char*>(p.v.data) + (r * p.v.row_stride + h * p.v.head_stride) * bytes, width);
    }
  }
}

}  // namespace fa::FA_ISA
