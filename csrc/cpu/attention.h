// The plan of an attention call, as bind_attention.cpp makes it and the kernels read it. Element offsets throughout.
//
// A sequence's keys are a list of KeyRuns in logical order: the segments of a root-to-leaf path, or the blocks of a cache.
// Queries come in QueryRuns (consecutive rows of one sequence). A Task holds runs whose first `shared` keys are the same
// memory, so those are packed once for all its rows.
#pragma once
#include <cstdint>
#include <vector>

#include "cpu/isa.h"

namespace fa::attention {

struct KeyRun {
  int64_t begin, count;        // logical positions begin .. begin+count
  int64_t k_origin, v_origin;  // of the first key, head 0
};

struct QueryRun {
  int64_t row, count;       // rows of q
  int64_t position;         // logical position of the first
  int key_first, key_count;  // KeyRuns of its sequence, which reach at least to its last position
};

struct Task {
  int run_first, run_count;
  int64_t shared;  // keys, a multiple of key_block
  int64_t rows;    // sum of the runs' counts
};

constexpr int64_t key_block = 64;
constexpr int64_t tile_rows = 128;  // (query, head) rows a task aims at

struct View {  // element (row, head, d) is at data[row * row_stride + head * head_stride + d]
  const void* data;
  int64_t row_stride, head_stride;
};

struct Problem {
  bool bf16;  // else fp32
  View q, k, v;
  int64_t heads, kv_heads, head_dim;
  float scale;
  float softcap;   // 0: none
  int64_t window;  // 0: none
};

struct Forward {
  Problem p;
  std::vector<KeyRun> keys;
  std::vector<QueryRun> runs;
  std::vector<Task> tasks;
  void* out;         // [T, heads, head_dim] contiguous
  float* lse;        // [T, heads] or null
};

// Segments of one root, ancestors first. Backward tasks are (tree, kv head): all their writes are their own.
struct TreeSegment {
  int64_t row, count, position;
  int parent;  // index in the tree's list, -1 for the root
};

struct Backward {
  Problem p;
  std::vector<std::vector<TreeSegment>> trees;
  const void *out, *grad;  // [T, heads, head_dim] contiguous, p.dtype
  const float* lse;        // [T, heads]
  float* delta;            // [T, heads], scratch
  float* dq;               // [T, heads, head_dim] fp32, zero
  void *dk, *dv;           // [T, kv_heads, head_dim], p.dtype; rows outside every tree are not touched
};

}  // namespace fa::attention

FA_DECLARE(void attention_forward(const attention::Forward& call);)
FA_DECLARE(void attention_backward(const attention::Backward& call);)
FA_DECLARE(void store_kv(const attention::Problem& p, const int64_t* slots, int64_t rows, int64_t block_size, void* k_cache,
                         void* v_cache);)
