// Paged attention on the GPU, for queries whose keys are in the cache: decode and short chunks.
//   out = softmax(cap(scale q kT)) v over the blocks of a sequence's table; store_kv puts new keys and values there.
// Layout: caches [blocks, kv_heads, block_size, head_dim]; an item of the plan (attention_plan.h) is one split of 128 keys and the
//   (query, head of the group) rows that read it from the same memory: the group's heads, and adjacent sequences that share a prefix.
// Grid: split_kernel (items, kv_heads), 128 threads: K of the split to shared memory (cp.async), scores with a thread a key, soft-max
//   with a warp a row, V over the same memory, output with a thread a pair of d. merge_kernel (tokens, heads) folds splits in order.
//   How many items and tokens there are is read from device memory: a block takes every gridDim.x-th item and one without work
//   returns, so a launch recorded in a CUDA graph serves every step that fits it.
// Bytes: K and V of a split once an item, so a shared prefix once for 32 rows; a partial output of head_dim + 2 floats a row and split,
//   written and read (group / 16 of the bf16 K and V of a split that one sequence reads).
// Numerics: fp32 sums by fma in a fixed order: q·k over d, P·V over quads of keys a thread, threads in order, splits in order. A row's
//   bits depend on its query, its keys, head_dim and dtype; not on the batch, the item, the cache's block size or sharing.
#include "attention.h"

#include "../math/exp.h"
#include "block.h"
#include "pack.h"

namespace fa::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

template <typename T>
struct alignas(2 * sizeof(T)) Pair {
  T lane[2];
};

// Rows of K or V in shared memory: 16 bytes of padding keep 16-byte reads of neighbouring rows in different banks.
template <typename T>
__host__ __device__ __forceinline__ int row_bytes(int head_dim) {
  return head_dim * static_cast<int>(sizeof(T)) + 16;
}

// Keys in shared memory at once.
template <typename T>
__host__ __device__ __forceinline__ int tile_keys(int head_dim) {
  return row_bytes<T>(head_dim) * kSplit > (80 << 10) ? kSplit / 2 : kSplit;
}

// One thread's share of a head's output: a pair of d, and every slots-th quad of keys.
struct Share {
  int pair, slot, slots;
  __device__ __forceinline__ explicit Share(int head_dim)
      : pair(threadIdx.x % (head_dim / 2)), slot(threadIdx.x / (head_dim / 2)), slots(kThreads / (head_dim / 2)) {}
};

template <int kRows>
struct Item {  // of the CTA, in shared memory
  int64_t origin[kSplit];  // of each key of the split, in elements of the cache, this head
  int64_t query[kRows];    // of each row, in elements of q
  int64_t cell[kRows];     // (cell, head) of the partial results
  int low[kRows], high[kRows];  // keys of the split that the row sees
};

template <int kRows>
__device__ __forceinline__ void read_item(const PagedAttention& a, const int32_t* item, Item<kRows>& s) {
  const int split = item[0], first = item[2], rows = item[3], group = a.heads / a.kv_heads;
  const int r = threadIdx.x;
  if (r < rows) {
    const int32_t* token = a.tokens + static_cast<int64_t>((first + r) / group) * 4;
    const int head = blockIdx.y * group + (first + r) % group, begin = split * kSplit, position = token[1];
    s.query[r] = token[0] * a.q_row_stride + head * a.q_head_stride;
    s.cell[r] = static_cast<int64_t>(token[3] + split - token[2]) * a.heads + head;
    const int seen = a.window ? position - a.window + 1 - begin : 0;
    s.low[r] = seen > 0 ? seen : 0;
    s.high[r] = position + 1 - begin < kSplit ? position + 1 - begin : kSplit;
  }
}

// Where each key of [low, high) lies; the others are never read.
template <int kRows>
__device__ __forceinline__ void find_keys(const PagedAttention& a, const int32_t* item, int low, int high, Item<kRows>& s) {
  const int key = threadIdx.x;
  int64_t origin = -1;
  if (key >= low && key < high) {
    const int at = item[0] * kSplit + key, block = a.tables[item[1] * a.table_stride + at / a.block_size];
    origin = ((static_cast<int64_t>(block) * a.kv_heads + blockIdx.y) * a.block_size + at % a.block_size) * a.head_dim;
  }
  s.origin[key] = origin;
}

// Keys [base, base + keys) of the split to shared memory; zeros where there is none.
template <typename T, int kRows>
__device__ __forceinline__ void load_tile(const T* cache, const Item<kRows>& s, int base, int keys, int head_dim, unsigned char* tile) {
  const int packs = head_dim / Pack<T>::kSize, stride = row_bytes<T>(head_dim);
  for (int i = threadIdx.x; i < keys * packs; i += kThreads) {
    const int key = i / packs, pack = i % packs;
    const int64_t origin = s.origin[base + key];
    const T* from = cache + (origin < 0 ? 0 : origin + pack * Pack<T>::kSize);
    __pipeline_memcpy_async(tile + key * stride + pack * 16, from, 16, origin < 0 ? 16 : 0);
  }
  __pipeline_commit();
}

// scores[r][base + key] = q[r] · k[key]; a thread a key, eight rows at a time.
template <typename T, int kRows>
__device__ __forceinline__ void score_tile(const unsigned char* tile, const float* q, int rows, int base, int keys, int head_dim,
                                           float* scores) {
  constexpr int kChunk = kRows < 8 ? kRows : 8;
  const int key = threadIdx.x % keys, step = kThreads / keys * kChunk;
  const unsigned char* row = tile + key * row_bytes<T>(head_dim);
  for (int r = threadIdx.x / keys * kChunk; r < rows; r += step) {
    float sum[kChunk] = {};
    for (int d = 0; d < head_dim; d += Pack<T>::kSize) {
      const Pack<T> k = *reinterpret_cast<const Pack<T>*>(row + d * sizeof(T));
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
#pragma unroll
        for (int j = 0; j < Pack<T>::kSize; j += 4) {
          const Pack<float> x = *reinterpret_cast<const Pack<float>*>(q + (r + i) * head_dim + d + j);
#pragma unroll
          for (int n = 0; n < 4; ++n) sum[i] = fmaf(x.lane[n], to_float(k.lane[j + n]), sum[i]);
        }
    }
#pragma unroll
    for (int i = 0; i < kChunk; ++i) scores[(r + i) * kSplit + base + key] = sum[i];
  }
}

// A row's scores → exp(score - maximum), zero where it does not see; the maximum and the sum to partial_sum. A warp a row.
template <int kRows>
__device__ __forceinline__ void softmax_rows(const PagedAttention& a, const Item<kRows>& s, int rows, float* scores) {
  const int lane = threadIdx.x % 32;
  for (int r = threadIdx.x / 32; r < rows; r += kWarps) {
    Pack<float>* cells = reinterpret_cast<Pack<float>*>(scores + r * kSplit) + lane;
    Pack<float> x = *cells;
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (a.softcap != 0.0f) x.lane[i] = math::tanh(x.lane[i] * (1.0f / a.softcap)) * a.softcap;
      if (lane * 4 + i < s.low[r] || lane * 4 + i >= s.high[r]) x.lane[i] = -INFINITY;
      top = fmaxf(top, x.lane[i]);
    }
    for (int mask = 16; mask > 0; mask /= 2) top = fmaxf(top, __shfl_xor_sync(kAll, top, mask));
#pragma unroll
    for (int i = 0; i < 4; ++i) x.lane[i] = math::exp(x.lane[i] - top);
    *cells = x;
    float sum = (x.lane[0] + x.lane[1]) + (x.lane[2] + x.lane[3]);
    for (int mask = 16; mask > 0; mask /= 2) sum += __shfl_xor_sync(kAll, sum, mask);
    if (lane == 0) a.partial_sum[s.cell[r] * 2] = top, a.partial_sum[s.cell[r] * 2 + 1] = sum;
  }
}

template <typename T, int kRows>
__device__ __forceinline__ void add_tile(const unsigned char* tile, const float* weights, int rows, int base, int keys, int head_dim,
                                         float (&sum)[kRows][2]) {
  constexpr int kChunk = kRows < 8 ? kRows : 8;
  const Share share(head_dim);
  if (share.slot >= share.slots) return;
  const int stride = row_bytes<T>(head_dim);
  for (int key = share.slot * 4; key < keys; key += share.slots * 4) {
    float v[4][2];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const Pair<T> x = *reinterpret_cast<const Pair<T>*>(tile + (key + j) * stride + share.pair * sizeof(Pair<T>));
      v[j][0] = to_float(x.lane[0]), v[j][1] = to_float(x.lane[1]);
    }
#pragma unroll
    for (int first = 0; first < kRows; first += kChunk) {
      if (first >= rows) break;
#pragma unroll
      for (int r = first; r < first + kChunk; ++r) {
        const Pack<float> w = *reinterpret_cast<const Pack<float>*>(weights + r * kSplit + base + key);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum[r][0] = fmaf(w.lane[j], v[j][0], sum[r][0]);
          sum[r][1] = fmaf(w.lane[j], v[j][1], sum[r][1]);
        }
      }
    }
  }
}

// The threads' sums, added slot by slot, to partial_out.
template <int kRows>
__device__ __forceinline__ void write_partial(const PagedAttention& a, const Item<kRows>& s, int rows, const float (&sum)[kRows][2],
                                              float* scratch) {
  const Share share(a.head_dim);
  if (share.slot < share.slots)
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      if (r < rows) {
        Pair<float> x;
        x.lane[0] = sum[r][0], x.lane[1] = sum[r][1];
        reinterpret_cast<Pair<float>*>(scratch + (share.slot * kRows + r) * a.head_dim)[share.pair] = x;
      }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * a.head_dim; i += kThreads) {
    const int r = i / a.head_dim, d = i % a.head_dim;
    float total = scratch[i];
    for (int slot = 1; slot < share.slots; ++slot) total += scratch[slot * kRows * a.head_dim + i];
    a.partial_out[s.cell[r] * a.head_dim + d] = total;
  }
}

template <typename T, int kRows>
__device__ __forceinline__ void run_item(const PagedAttention& a, const int32_t* item, Item<kRows>& s, unsigned char* tile, int tile_bytes) {
  float *q = reinterpret_cast<float*>(tile + tile_bytes), *scores = q + kRows * a.head_dim;
  const int rows = item[3], keys = tile_keys<T>(a.head_dim);
  read_item(a, item, s);
  __syncthreads();
  int low = kSplit, high = 0;
  for (int r = 0; r < rows; ++r) low = s.low[r] < low ? s.low[r] : low, high = s.high[r] > high ? s.high[r] : high;
  find_keys(a, item, low, high, s);
  __syncthreads();
  for (int base = 0; base < kSplit; base += keys) {
    load_tile(static_cast<const T*>(a.k_cache), s, base, keys, a.head_dim, tile);
    if (base == 0)
      for (int i = threadIdx.x; i < kRows * a.head_dim; i += kThreads) {
        const int r = i / a.head_dim;
        q[i] = r < rows ? to_float(static_cast<const T*>(a.q)[s.query[r] + i % a.head_dim]) * a.scale : 0.0f;
      }
    __pipeline_wait_prior(0);
    __syncthreads();
    score_tile<T, kRows>(tile, q, rows, base, keys, a.head_dim, scores);
    __syncthreads();
  }
  float sum[kRows][2] = {};
  for (int base = 0; base < kSplit; base += keys) {
    load_tile(static_cast<const T*>(a.v_cache), s, base, keys, a.head_dim, tile);
    if (base == 0) softmax_rows(a, s, rows, scores);
    __pipeline_wait_prior(0);
    __syncthreads();
    add_tile<T, kRows>(tile, scores, rows, base, keys, a.head_dim, sum);
    __syncthreads();
  }
  write_partial(a, s, rows, sum, reinterpret_cast<float*>(tile));
}

template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, 4) split_kernel(PagedAttention a, int size, int tile_bytes) {
  __shared__ Item<kRows> s;
  FA_DYNAMIC_SHARED(unsigned char, tile);
  int64_t first = 0;
  for (int i = 0; i < size; ++i) first += a.counts[1 + i];
  const int count = a.counts[1 + size];
  for (int i = blockIdx.x; i < count; i += gridDim.x) {
    run_item<T, kRows>(a, a.items + (first + i) * 4, s, tile, tile_bytes);
    __syncthreads();  // the next item writes where this one reads
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) merge_kernel(PagedAttention a) {
  if (static_cast<int>(blockIdx.x) >= a.counts[0]) return;
  const int32_t* token = a.tokens + static_cast<int64_t>(blockIdx.x) * 4;
  const int head = blockIdx.y, splits = token[1] / kSplit - token[2] + 1;
  const int64_t first = static_cast<int64_t>(token[3]) * a.heads + head;
  float top = -INFINITY;
  for (int i = 0; i < splits; ++i) top = fmaxf(top, a.partial_sum[(first + static_cast<int64_t>(i) * a.heads) * 2]);
  T* out = static_cast<T*>(a.out) + (static_cast<int64_t>(token[0]) * a.heads + head) * a.head_dim;
  for (int d = threadIdx.x; d < a.head_dim; d += kThreads) {
    float total = 0.0f, sum = 0.0f;
    for (int i = 0; i < splits; ++i) {
      const int64_t cell = first + static_cast<int64_t>(i) * a.heads;
      const float weight = math::exp(a.partial_sum[cell * 2] - top);
      sum = fmaf(weight, a.partial_sum[cell * 2 + 1], sum);
      total = fmaf(weight, a.partial_out[cell * a.head_dim + d], total);
    }
    from_float(out[d], total / sum);
  }
}

template <typename Word>
__global__ void __launch_bounds__(kThreads) store_kernel(StoreKV a, int words, int scale) {  // strides in words: elements / scale
  const int64_t row = blockIdx.x, slot = a.slots[row];
  if (slot < 0 || slot >= a.capacity) return;
  const int64_t block = slot / a.block_size, offset = slot % a.block_size;
  const Word *k = static_cast<const Word*>(a.k) + row * (a.k_row_stride / scale), *v = static_cast<const Word*>(a.v) + row * (a.v_row_stride / scale);
  for (int i = threadIdx.x; i < a.kv_heads * words; i += kThreads) {
    const int head = i / words, word = i % words;
    const int64_t to = ((block * a.kv_heads + head) * a.block_size + offset) * words + word;
    static_cast<Word*>(a.k_cache)[to] = k[head * (a.k_head_stride / scale) + word];
    static_cast<Word*>(a.v_cache)[to] = v[head * (a.v_head_stride / scale) + word];
  }
}

template <typename T, int kRows>
void launch_items(const PagedAttention& a, int size, uintptr_t stream) {
  if (a.num_items[size] == 0) return;
  const int slots = kThreads / (a.head_dim / 2), scratch = slots * kRows * a.head_dim * static_cast<int>(sizeof(float));
  const int keys = tile_keys<T>(a.head_dim) * row_bytes<T>(a.head_dim), tile = keys > scratch ? keys : scratch;
  const size_t shared = tile + static_cast<size_t>(kRows) * (a.head_dim + kSplit) * sizeof(float);
  launch_shared("paged_attention", &split_kernel<T, kRows>, dim3(static_cast<unsigned>(a.num_items[size]), a.kv_heads), kThreads, shared,
                stream, a, size, tile);
}

template <typename T>
void run(const PagedAttention& a, uintptr_t stream) {
  if (a.num_tokens == 0) return;
  launch_items<T, kItemRows[0]>(a, 0, stream);
  launch_items<T, kItemRows[1]>(a, 1, stream);
  launch_items<T, kItemRows[2]>(a, 2, stream);
  launch("paged_attention", &merge_kernel<T>, dim3(static_cast<unsigned>(a.num_tokens), a.heads), kThreads, stream, a);
}

}  // namespace

void paged_attention(const PagedAttention& call, uintptr_t stream) {
  if (call.bf16)
    run<uint16_t>(call, stream);
  else
    run<float>(call, stream);
}

void store_kv(const StoreKV& call, uintptr_t stream) {
  if (call.rows == 0) return;
  const int scale = call.bf16 ? 8 : 4;  // elements in 16 bytes
  bool wide = call.head_dim % scale == 0;
  for (const void* p : {call.k, call.v, static_cast<const void*>(call.k_cache), static_cast<const void*>(call.v_cache)})
    wide = wide && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  for (int64_t stride : {call.k_row_stride, call.k_head_stride, call.v_row_stride, call.v_head_stride}) wide = wide && stride % scale == 0;
  const dim3 grid(static_cast<unsigned>(call.rows));
  if (wide)
    launch("store_kv", &store_kernel<Pack<float>>, grid, kThreads, stream, call, call.head_dim / scale, scale);
  else if (call.bf16)
    launch("store_kv", &store_kernel<uint16_t>, grid, kThreads, stream, call, call.head_dim, 1);
  else
    launch("store_kv", &store_kernel<float>, grid, kThreads, stream, call, call.head_dim, 1);
}

}  // namespace fa::cuda
