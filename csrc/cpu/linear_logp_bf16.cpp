// Products of bf16 matrices with fp32 results, which no CPU GEMM of torch gives: the logits of a bf16 head unrounded, and its gradient
// added straight into an fp32 sum.
//   layout: two consecutive k are one 32-bit word. B is packed once a panel into [k/2][kPanel] words; a word of A is broadcast.
//   tile:   kRows x kPanel sums stay in registers over the whole k, so that a result is one running sum, whatever the rows around it.
//   dot:    vdpbf16ps where the machine has it (two products a lane and instruction); elsewhere two fp32 FMAs on the widened halves.
#include <algorithm>
#include <memory>

#include "linear_logp.h"
#include "simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16")
#endif
#endif

namespace fa::FA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 8, kVectors = 3;
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int kPanel = kVectors * kLanes;  // columns of the result
constexpr int64_t kBlock = 64;             // rows of a packed block of A: with k = 512, 64 KiB
constexpr int64_t kDepth = 1024;           // k of one pass where the result is added to

FA_SIMD vu load_words(const uint32_t* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FA_SIMD uint32_t load_word(const unsigned char* p) {
  uint32_t word;
  std::memcpy(&word, p, sizeof word);
  return word;
}

template <bool kDot>
FA_SIMD void add_pair(vf& sum, uint32_t a, vu b) {
#if defined(__AVX512F__)
  if constexpr (kDot) {
    sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
    return;
  }
#endif
  sum += to_float(static_cast<uint16_t>(a)) * (vf)(b << 16);
  sum += to_float(static_cast<uint16_t>(a >> 16)) * (vf)(b & 0xffff0000u);
}

// A as the tile reads it: the word of (row, pair) lies row * row_bytes + pair * pair_bytes from the start of its tile.
struct Words {
  const unsigned char* start;
  int64_t row_bytes, pair_bytes, tile_bytes;
};

template <int kCount, bool kDot>
FA_SIMD void tile_sums(const Words& a, const uint32_t* panel, int64_t pairs, vf (&sums)[kCount][kVectors]) {
  const unsigned char* word = a.start;
  for (int64_t p = 0; p < pairs; ++p, word += a.pair_bytes, panel += kPanel) {
    vu b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = load_words(panel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const uint32_t one = load_word(word + r * a.row_bytes);
      for (int v = 0; v < kVectors; ++v) add_pair<kDot>(sums[r][v], one, b[v]);
    }
  }
}

// Where a tile goes: out = start + sums, or out (+)= alpha * sums.
struct Target {
  float* out;
  int64_t stride, columns;  // columns <= kPanel
  const float* bias;        // of the panel's columns, or null
  float alpha;
  bool add;
};

template <int kCount, bool kDot>
void tile(const Words& a, const uint32_t* panel, int64_t pairs, const Target& to) {
  for (int r = 0; r < kCount; ++r)  // the results are out of the cache: they arrive while the sums are taken
    for (int64_t c = 0; c < to.columns; c += kLanes) __builtin_prefetch(to.out + r * to.stride + c, 1);
  vf sums[kCount][kVectors] = {};
  if (to.bias)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t left = to.columns - v * kLanes;
      const vf start = left >= kLanes ? load(to.bias + v * kLanes) : left > 0 ? load_part(to.bias + v * kLanes, left, 0.0f) : vf{};
      for (int r = 0; r < kCount; ++r) sums[r][v] = start;
    }
  tile_sums<kCount, kDot>(a, panel, pairs, sums);
  for (int r = 0; r < kCount; ++r) {
    float* out = to.out + r * to.stride;
    for (int v = 0; v < kVectors; ++v, out += kLanes) {
      const int64_t left = to.columns - v * kLanes;
      if (left <= 0) break;
      vf value = sums[r][v] * to.alpha;
      if (left >= kLanes) {
        if (to.add) value += load(out);
        store(out, value);
      } else {
        if (to.add) value += load_part(out, left, 0.0f);
        store_part(out, value, left);
      }
    }
  }
}

// As many tiles of kCount rows as fit, then smaller ones: a row's sum is the same in any of them.
template <int kCount, bool kDot>
void rows_of_tiles(Words a, int64_t rows, const uint32_t* panel, int64_t pairs, Target to) {
  for (; rows >= kCount; rows -= kCount) {
    tile<kCount, kDot>(a, panel, pairs, to);
    a.start += kCount == kRows ? a.tile_bytes : kCount * a.row_bytes;
    to.out += kCount * to.stride;
  }
  if constexpr (kCount > 1) {
    if (rows > 0) rows_of_tiles<kCount / 2, kDot>(a, rows, panel, pairs, to);
  }
}

// Rows [columns, k] of B, k contiguous → [k/2][kPanel] words, zeros beside and below. Written in order; the kPanel lines that are read
// for it stay in the first-level cache until all their words are used.
void pack_transposed(const uint16_t* b, int64_t stride, int64_t columns, int64_t k, uint32_t* panel) {
  int64_t p = 0;
  if (columns == kPanel)
    for (; p < k / 2; ++p, panel += kPanel)
      for (int64_t c = 0; c < kPanel; ++c) std::memcpy(panel + c, b + c * stride + 2 * p, 4);
  for (; p < (k + 1) / 2; ++p, panel += kPanel)
    for (int64_t c = 0; c < kPanel; ++c) {
      panel[c] = 0;
      if (c < columns) std::memcpy(panel + c, b + c * stride + 2 * p, 2 * p + 1 < k ? 4 : 2);
    }
}

// [k, columns], columns contiguous → [columns/kWidth][k/2][kWidth] words, zeros beside and below.
template <int kWidth>
void pack_interleaved(const uint16_t* b, int64_t stride, int64_t columns, int64_t k, uint32_t* words) {
  const int64_t pairs = (k + 1) / 2;
  for (int64_t p = 0; p < pairs; ++p) {
    const uint16_t* low = b + 2 * p * stride;
    const bool both = 2 * p + 1 < k;
    const uint16_t* high = both ? low + stride : low;
    const uint32_t mask = both ? 0xffff0000u : 0u;
    uint32_t* to = words + p * kWidth;
    int64_t c = 0;
    for (; c + kWidth <= columns; c += kWidth, to += pairs * kWidth)
      for (int i = 0; i < kWidth; ++i) to[i] = low[c + i] | (static_cast<uint32_t>(high[c + i]) << 16 & mask);
    if (c < columns)
      for (int i = 0; i < kWidth; ++i) to[i] = c + i < columns ? low[c + i] | (static_cast<uint32_t>(high[c + i]) << 16 & mask) : 0u;
  }
}

template <bool kDot>
void product_rows_with(const Bf16Product& product) {
  const int64_t pairs = (product.k + 1) / 2, panels = (product.n + kPanel - 1) / kPanel;
  const Words a{reinterpret_cast<const unsigned char*>(product.a), product.a_stride * 2, 4, product.a_stride * 2 * kRows};
#pragma omp parallel
  {
    const std::unique_ptr<uint32_t[]> panel(new uint32_t[pairs * kPanel]);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t first = i * kPanel, columns = std::min<int64_t>(kPanel, product.n - first);
      pack_transposed(product.b + first * product.b_stride, product.b_stride, columns, product.k, panel.get());
      const float* bias = product.bias ? product.bias + first : nullptr;
      rows_of_tiles<kRows, kDot>(a, product.m, panel.get(), pairs, {product.out + first, product.out_stride, columns, bias, 1.0f, false});
    }
  }
}

template <bool kDot>
void product_columns_with(const Bf16Product& product, int64_t begin, int64_t depth, bool add) {
  const int64_t pairs = (depth + 1) / 2, panels = (product.n + kPanel - 1) / kPanel, blocks = (product.m + kBlock - 1) / kBlock;
  const std::unique_ptr<uint32_t[]> packed(new uint32_t[panels * pairs * kPanel]);
#pragma omp parallel
  {
    const std::unique_ptr<uint32_t[]> block(new uint32_t[pairs * kBlock]);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t first = i * kPanel, columns = std::min<int64_t>(kPanel, product.n - first);
      const uint16_t* b = product.b + begin * product.b_stride + first;
      pack_interleaved<kPanel>(b, product.b_stride, columns, depth, packed.get() + i * pairs * kPanel);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t row = i * kBlock, rows = std::min<int64_t>(kBlock, product.m - row);
      pack_interleaved<kRows>(product.a + begin * product.a_stride + row, product.a_stride, rows, depth, block.get());
      const Words a{reinterpret_cast<const unsigned char*>(block.get()), 4, 4 * kRows, 4 * kRows * pairs};
      for (int64_t j = 0; j < panels; ++j) {
        const int64_t first = j * kPanel, columns = std::min<int64_t>(kPanel, product.n - first);
        float* out = product.out + row * product.out_stride + first;
        const Target to{out, product.out_stride, columns, nullptr, product.alpha, add};
        rows_of_tiles<kRows, kDot>(a, rows, packed.get() + j * pairs * kPanel, pairs, to);
      }
    }
  }
}

}  // namespace

void product_rows(const Bf16Product& product) {
#if defined(__AVX512F__)
  if (product.dot) return product_rows_with<true>(product);
#endif
  product_rows_with<false>(product);
}

void product_columns(const Bf16Product& product) {
  for (int64_t begin = 0; begin < product.k; begin += kDepth) {
    const int64_t depth = std::min(kDepth, product.k - begin);
    const bool add = product.add || begin > 0;
#if defined(__AVX512F__)
    if (product.dot) {
      product_columns_with<true>(product, begin, depth, add);
      continue;
    }
#endif
    product_columns_with<false>(product, begin, depth, add);
  }
}

}  // namespace fa::FA_ISA

#if defined(__AVX512F__)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
