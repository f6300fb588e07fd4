// Paged attention on the GPU: what bind_attention_cuda.h checks and the kernels read. Device pointers, element strides.
#pragma once
#include <cstdint>

namespace fa::cuda {

// Keys are taken in splits of this many logical positions, counted from the start of the sequence: a split's numbers depend on the
// query and those keys alone, and splits are merged in order, so a row's bits depend on nothing else in the batch.
constexpr int kSplit = 128;
// An item holds (query, head of the group) rows that read one split from the same memory; kernels exist for up to so many rows.
constexpr int kItemRows[] = {4, 8, 32};
constexpr int kItemSizes = 3;
// Launches of a fixed shape have at most so many blocks a key head and size, several times what a GPU holds at once.
constexpr int64_t kFixedBlocks = 2048;

struct PagedAttention {
  bool bf16;  // else fp32
  const void* q;
  int64_t q_row_stride, q_head_stride;
  const void *k_cache, *v_cache;  // [blocks, kv_heads, block_size, head_dim] contiguous, 16-byte aligned
  const int32_t* tables;          // [sequences, table_stride]
  int64_t table_stride;
  const int32_t* counts;             // [1 + kItemSizes]: tokens, and items of each size
  const int32_t* tokens;             // [counts[0]][4]: row of q and out, position, first split, first cell
  const int32_t* items;              // [sum of the others][4]: split, sequence, first row (token * group + head), rows
  int64_t num_tokens, num_items[kItemSizes];  // of the grids; kernels take their work from counts, so a larger grid idles
  int heads, kv_heads, head_dim, block_size;
  int window;  // 0: none
  float scale, softcap;  // 0: none
  float* partial_out;  // [cells, heads, head_dim]: a token has a cell for each split that it sees
  float* partial_sum;  // [cells, heads, 2]: maximum, sum of exp
  void* out;           // [T, heads, head_dim] contiguous
};

struct StoreKV {
  bool bf16;
  const void *k, *v;
  int64_t k_row_stride, k_head_stride, v_row_stride, v_head_stride;
  const int64_t* slots;
  int64_t rows, capacity;  // slots outside [0, capacity) are skipped
  int kv_heads, head_dim, block_size;
  void *k_cache, *v_cache;
};

// Launch on `stream` (a cudaStream_t) of the current device; throw std::runtime_error when the launch fails.
void paged_attention(const PagedAttention& call, uintptr_t stream);
void store_kv(const StoreKV& call, uintptr_t stream);

}  // namespace fa::cuda
