// The host's plan of a paged step: which (query, head) rows read which split of keys, and which of them read it together.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention.h"

namespace fa::cuda {

struct Step {  // one step of generation, on the host
  std::vector<int64_t> bounds, contexts;  // new tokens [S+1], visible keys [S]
  const int32_t* tables;
  int64_t table_stride, max_blocks, block_size, num_blocks;
  int64_t group;      // query heads a key head
  int64_t window;     // 0: none
  int64_t max_fresh;  // sequences with more new tokens are left out
  int64_t max_tokens, max_cells;  // what launches of a fixed shape have room for; 0: they fit this step alone
};

struct Plan {
  std::vector<int32_t> numbers;  // counts, tokens (room for max_tokens), items: as PagedAttention reads them
  int64_t tokens = 0, cells = 0, items[kItemSizes] = {};  // of the launches
};

struct PlannedToken {
  int64_t row, position, first, last, sequence;  // first, last: splits
};

// Keys at the start of sequence s that are the same memory as the sequence before it.
inline int64_t common_keys(const Step& step, int64_t s) {
  if (s == 0) return 0;
  const int32_t *a = step.tables + (s - 1) * step.table_stride, *b = a + step.table_stride;
  const int64_t keys = std::min(step.contexts[s - 1], step.contexts[s]);
  int64_t block = 0;
  while (block * step.block_size < keys && a[block] == b[block]) ++block;
  return std::min(keys, block * step.block_size);
}

inline void check_blocks(const Step& step, int64_t s, int64_t first_key) {
  const int64_t blocks = (step.contexts[s] + step.block_size - 1) / step.block_size;
  if (blocks > step.max_blocks)
    throw std::invalid_argument("paged_attention: a context of " + std::to_string(step.contexts[s]) + " keys needs more than the " +
                                std::to_string(step.max_blocks) + " blocks of its table");
  for (int64_t i = first_key / step.block_size; i < blocks; ++i) {
    const int32_t block = step.tables[s * step.table_stride + i];
    if (block < 0 || block >= step.num_blocks)
      throw std::invalid_argument("paged_attention: block_tables must be in [0, " + std::to_string(step.num_blocks) + "), got " +
                                  std::to_string(block));
  }
}

inline std::vector<PlannedToken> plan_tokens(const Step& step) {
  std::vector<PlannedToken> tokens;
  for (int64_t s = 0; s < static_cast<int64_t>(step.contexts.size()); ++s) {
    const int64_t fresh = step.bounds[s + 1] - step.bounds[s];
    if (fresh == 0 || fresh > step.max_fresh) continue;
    if (fresh > step.contexts[s])
      throw std::invalid_argument("paged_attention: sequence " + std::to_string(s) + " has more new tokens than its context_lens");
    auto seen = [&](int64_t at) { return step.window ? std::max<int64_t>(0, at - step.window + 1) : 0; };
    const int64_t start = step.contexts[s] - fresh;
    check_blocks(step, s, seen(start));
    for (int64_t at = start; at < step.contexts[s]; ++at)
      tokens.push_back({step.bounds[s] + at - start, at, seen(at) / kSplit, at / kSplit, s});
  }
  return tokens;
}

// The smallest kernel that holds so many rows.
inline int size_for(int64_t rows) {
  int size = 0;
  while (size < kItemSizes - 1 && kItemRows[size] < rows) ++size;
  return size;
}

// Cuts `rows` rows of one split into items; none goes to a kernel too small for a group, so a step needs fewer launches.
inline void cut(int64_t split, int64_t sequence, int64_t first, int64_t rows, int64_t group, std::vector<int32_t> (&items)[kItemSizes]) {
  for (int64_t n = 0; n < rows; n += kItemRows[kItemSizes - 1]) {
    const int64_t count = std::min<int64_t>(rows - n, kItemRows[kItemSizes - 1]);
    for (int64_t x : {split, sequence, first + n, count}) items[size_for(std::max(count, group))].push_back(static_cast<int32_t>(x));
  }
}

// Launches that hold any step of max_tokens tokens and max_cells cells: a cell is read by at most one item per 32 rows of its group.
inline void fix_launches(const Step& step, Plan& plan) {
  if (plan.tokens > step.max_tokens || plan.cells > step.max_cells)
    throw std::invalid_argument("paged_attention: a step of " + std::to_string(plan.tokens) + " tokens and " + std::to_string(plan.cells) +
                                " splits of keys does not fit launches for " + std::to_string(step.max_tokens) + " and " +
                                std::to_string(step.max_cells));
  const int64_t widest = kItemRows[kItemSizes - 1], items = step.max_cells * ((step.group + widest - 1) / widest);
  plan.tokens = step.max_tokens;
  plan.cells = step.max_cells;
  for (int size = 0; size < kItemSizes; ++size) plan.items[size] = size < size_for(step.group) ? 0 : std::min(items, kFixedBlocks);
}

inline Plan make_plan(const Step& step) {
  const std::vector<PlannedToken> tokens = plan_tokens(step);
  Plan plan;
  plan.tokens = static_cast<int64_t>(tokens.size());
  plan.numbers.resize(1 + kItemSizes);
  int64_t splits = 0;
  for (const PlannedToken& t : tokens) {
    for (int64_t x : {t.row, t.position, t.first, plan.cells}) plan.numbers.push_back(static_cast<int32_t>(x));
    plan.cells += t.last - t.first + 1;
    splits = std::max(splits, t.last + 1);
  }
  plan.numbers.resize(1 + kItemSizes + 4 * std::max(plan.tokens, step.max_tokens));
  std::vector<int64_t> shared(plan.tokens);  // keys in one memory with the token before
  for (int64_t i = 1; i < plan.tokens; ++i) {
    const int64_t s = tokens[i].sequence, before = tokens[i - 1].sequence;
    shared[i] = s == before ? step.contexts[s] : s == before + 1 ? common_keys(step, s) : 0;
  }
  std::vector<int32_t> items[kItemSizes];
  for (int64_t split = 0; split < splits; ++split) {
    auto sees = [&](int64_t i) { return tokens[i].first <= split && split <= tokens[i].last; };
    auto joins = [&](int64_t i) {
      return sees(i) && (tokens[i].sequence == tokens[i - 1].sequence || shared[i] >= (split + 1) * kSplit);
    };
    for (int64_t i = 0, end; i < plan.tokens; i = end) {
      end = i + 1;
      if (!sees(i)) continue;
      while (end < plan.tokens && joins(end)) ++end;
      cut(split, tokens[i].sequence, i * step.group, (end - i) * step.group, step.group, items);
    }
  }
  plan.numbers[0] = static_cast<int32_t>(plan.tokens);
  for (int size = 0; size < kItemSizes; ++size) {
    plan.items[size] = static_cast<int64_t>(items[size].size()) / 4;
    plan.numbers[1 + size] = static_cast<int32_t>(plan.items[size]);
    plan.numbers.insert(plan.numbers.end(), items[size].begin(), items[size].end());
  }
  if (step.max_tokens) fix_launches(step, plan);
  return plan;
}

}  // namespace fa::cuda
