// Weight-only int8: weights are widened in registers and meet the activations in the activations' own precision. Widening again for
// every tile hides behind the multiplications: on an AMD EPYC with AVX-512 a panel widened once into the cache was slower at any row count.
//   layout: panels of 16 outputs; a 32-bit word holds four consecutive k of one output, so that every instruction set reads whole vectors
//           and shifts make the numbers. 64 bytes are 64 weights: at few rows the product costs reading them.
//   tile:   kRows rows x kPanels panels of sums stay in registers over the whole k.
//   fp32:   one FMA a weight and row. bf16: pairs by vdpbf16ps where the machine has it (an int8 is exact in bf16), else widened to fp32.
#include <algorithm>
#include <memory>

#include "int8.h"
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
constexpr int kRows = 8, kGroup = 3;  // 24 sums in 32 registers
#else
constexpr int kRows = 4, kGroup = 1;
#endif
constexpr int kPer = kInt8Columns / kLanes;  // vectors of a panel
constexpr int64_t kBlock = 128;              // rows of x that stay in the cache while all panels pass
constexpr int64_t kSerial = 1 << 15;         // products of fewer multiplications are not worth waking threads

FA_SIMD vu load_words(const uint32_t* p) {
  vu v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
FA_SIMD vf byte_of(vu words, int j) { return __builtin_convertvector(((vi)(words << (24 - 8 * j))) >> 24, vf); }

// What one step of k multiplies: one number as fp32, or a pair as two bf16 (exact: the low half of the float is 0).
template <bool kDot>
constexpr int kSteps = kDot ? kInt8Depth / 2 : kInt8Depth;
template <bool kDot>
FA_SIMD vf widened(vu words, int step) {
  if constexpr (!kDot) return byte_of(words, step);
  return (vf)(((vu)byte_of(words, 2 * step) >> 16) | (vu)byte_of(words, 2 * step + 1));
}

template <bool kDot>
FA_SIMD void add(vf& sum, uint32_t x, vf weight) {
#if defined(__AVX512F__)
  if constexpr (kDot) {
    sum = (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)), (__m512bh)weight);
    return;
  }
#endif
  float one;
  std::memcpy(&one, &x, 4);
  sum += one * weight;
}

// x as the tile reads it: 4-byte steps of k (a float, or a pair of bf16), padded with zeros to whole words.
struct Rows {
  const unsigned char* start;
  int64_t row_bytes;
};

struct Target {
  const Int8Product& product;
  int64_t row, column;
};

template <int kPanels>
FA_SIMD void finish(const Target& to, int64_t row, const vf (&sums)[kPanels * kPer]) {
  const Int8Product& product = to.product;
  int64_t column = to.column, at = row * product.n + to.column;
  for (int v = 0; v < kPanels * kPer; ++v, column += kLanes, at += kLanes) {
    const int64_t left = product.n - column;
    if (left <= 0) return;
    const bool whole = left >= kLanes;
    vf value = sums[v] * (whole ? load(product.scale + column) : load_part(product.scale + column, left, 0.0f));
    if (product.bias) value += whole ? load(product.bias + column) : load_part(product.bias + column, left, 0.0f);
    auto put = [&](auto* out) __attribute__((always_inline)) { whole ? store(out + at, value) : store_part(out + at, value, left); };
    product.bf16 ? put(static_cast<uint16_t*>(product.out)) : put(static_cast<float*>(product.out));
  }
}

// Panels as the tile reads them: one after the other, panel_words apart.
struct Panels {
  const uint32_t* words;
  int64_t panel_words, blocks;  // blocks of kInt8Depth steps of k
};

template <bool kDot, int kPanels, int kCount>
void tile(const Panels& weights, Rows x, const Target& to) {
  constexpr int kVectors = kPanels * kPer;
  vf sums[kCount][kVectors] = {};
  for (int64_t block = 0; block < weights.blocks; ++block) {
    vu words[kVectors];
    for (int v = 0; v < kVectors; ++v)
      words[v] = load_words(weights.words + v / kPer * weights.panel_words + block * kInt8Columns + v % kPer * kLanes);
    for (int step = 0; step < kSteps<kDot>; ++step, x.start += 4) {
      vf weight[kVectors];
      for (int v = 0; v < kVectors; ++v) weight[v] = widened<kDot>(words[v], step);
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
        uint32_t one;
        std::memcpy(&one, x.start + r * x.row_bytes, 4);
        for (int v = 0; v < kVectors; ++v) add<kDot>(sums[r][v], one, weight[v]);
      }
    }
  }
  for (int r = 0; r < kCount; ++r) finish<kPanels>(to, to.row + r, sums[r]);
}

// As many tiles of kCount rows as fit, then smaller ones: a row's sum is the same in any of them.
template <bool kDot, int kPanels, int kCount>
void tiles(const Panels& weights, Rows x, int64_t rows, Target to) {
  for (; rows >= kCount; rows -= kCount) {
    tile<kDot, kPanels, kCount>(weights, x, to);
    x.start += kCount * x.row_bytes;
    to.row += kCount;
  }
  if constexpr (kCount > 1) {
    if (rows > 0) tiles<kDot, kPanels, kCount / 2>(weights, x, rows, to);
  }
}

template <bool kDot>
void group(const Int8Product& product, int64_t panel, Rows x, int64_t row, int64_t rows) {
  const int64_t blocks = (product.k + kInt8Depth - 1) / kInt8Depth, count = (product.n + kInt8Columns - 1) / kInt8Columns;
  Panels weights{product.words + panel * blocks * kInt8Columns, blocks * kInt8Columns, blocks};
  if (panel + kGroup <= count) return tiles<kDot, kGroup, kRows>(weights, x, rows, {product, row, panel * kInt8Columns});
  for (; panel < count; ++panel, weights.words += weights.panel_words)
    tiles<kDot, 1, kRows>(weights, x, rows, {product, row, panel * kInt8Columns});
}

// Whether the tile can read x where it is.
template <bool kDot>
bool in_place(const Int8Product& product) {
  return product.bf16 == kDot && product.k % kInt8Depth == 0;
}

template <bool kDot>
void copy_row(const Int8Product& product, int64_t row, unsigned char* to, int64_t row_bytes) {
  const int64_t start = row * product.x_stride, k = product.k, written = k * (kDot ? 2 : 4);
  if (product.bf16 == kDot) {
    std::memcpy(to, static_cast<const unsigned char*>(product.x) + start * (kDot ? 2 : 4), written);
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(product.x) + start;
    for (int64_t i = 0; i < k; ++i) {
      const float wide = to_float(from[i]);
      std::memcpy(to + 4 * i, &wide, 4);
    }
  }
  std::memset(to + written, 0, row_bytes - written);
}

template <bool kDot>
void product_with(const Int8Product& product) {
  const int64_t blocks = (product.k + kInt8Depth - 1) / kInt8Depth, row_bytes = 4 * kSteps<kDot> * blocks;
  const int64_t groups = ((product.n + kInt8Columns - 1) / kInt8Columns + kGroup - 1) / kGroup, most = std::min(product.m, kBlock);
  const bool copied = !in_place<kDot>(product);
  const std::unique_ptr<unsigned char[]> copies(copied ? new unsigned char[most * row_bytes] : nullptr);
#pragma omp parallel if (product.m * product.n * product.k > kSerial)
  {
    for (int64_t row = 0; row < product.m; row += kBlock) {
      const int64_t rows = std::min(kBlock, product.m - row);
      Rows x{static_cast<const unsigned char*>(product.x) + row * product.x_stride * (kDot ? 2 : 4), product.x_stride * (kDot ? 2 : 4)};
      if (copied) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; ++i) copy_row<kDot>(product, row + i, copies.get() + i * row_bytes, row_bytes);
        x = {copies.get(), row_bytes};
      }
#pragma omp for schedule(static)
      for (int64_t i = 0; i < groups; ++i) group<kDot>(product, i * kGroup, x, row, rows);
    }
  }
}

}  // namespace

void int8_product(const Int8Product& product) {
#if defined(__AVX512F__)
  if (product.bf16 && product.dot) return product_with<true>(product);
#endif
  product_with<false>(product);
}

}  // namespace fa::FA_ISA

#if defined(__AVX512F__)
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
