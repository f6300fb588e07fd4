// The bf16 products of linear_logp_bf16.cpp on AMX: a tile of 16 x 16 fp32 sums takes 16 x 32 of A and 32 x 16 of B an instruction.
//   layout: both operands are packed into tiles of 1 KiB, [lines / 16][k / 32][16][16 words], a word two consecutive k, zeros beside
//           and below. A tile of A has a line of the operand in a row, one of B in a column: where the operand lies the other way its
//           words are transposed on the way, 16 x 16 in registers.
//   tile:   2 x 2 sums, so that four products share two tiles of either operand; then scaled and added to the results by vectors.
//   bits:   a result is one running sum over the k of a pass, whatever the rows around it. Denormals count as zeros.
#include <algorithm>
#include <memory>

#include "linear_logp.h"
#include "simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
#endif

namespace fa::FA_ISA {
namespace {

constexpr int kSide = 16;                       // lines of a tile, and the words of each
constexpr int64_t kWords = kSide * kSide;       // of a tile
constexpr int64_t kStep = 2 * kSide;            // k of a tile
constexpr int64_t kSpan = 2 * kSide;            // rows and columns of the sums in registers
constexpr int64_t kPanel = 2 * kSpan;           // columns that a thread packs where the results are rows of logits
constexpr int64_t kBlock = 4 * kSpan;           // rows that it packs where they are rows of a head gradient: with k = 512, 128 KiB
constexpr int64_t kDepth = 1024;                // k of one pass where the result is added to

// The tiles' shapes, all alike; at its end the thread has the configuration that it had before.
class Configured {
 public:
  Configured() {
    _tile_storeconfig(&before_);
    Shapes all{};
    all.palette = 1;
    for (int i = 0; i < 8; ++i) {
      all.row_bytes[i] = kSide * 4;
      all.rows[i] = kSide;
    }
    _tile_loadconfig(&all);
  }
  ~Configured() { _tile_loadconfig(&before_); }
  Configured(const Configured&) = delete;
  Configured& operator=(const Configured&) = delete;

 private:
  struct alignas(64) Shapes {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Shapes before_{};
};

// Memory that no thread zeroes first, aligned to a cache line.
struct Free {
  void operator()(uint32_t* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Tiles = std::unique_ptr<uint32_t[], Free>;
Tiles tiles(int64_t words) { return Tiles(new (std::align_val_t{64}) uint32_t[words]); }

int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The masked forms, all of whose lanes are on: GCC 12 takes the others' don't-care operand for an uninitialized variable.
constexpr __mmask16 kAll = 0xffff;
constexpr __mmask8 kAll8 = 0xff;

// Word j of row i becomes word i of row j.
FA_SIMD void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_maskz_unpacklo_epi32(kAll, r[i], r[i + 1]);
    t[i + 1] = _mm512_maskz_unpackhi_epi32(kAll, r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int half = 0; half < 2; ++half) {
      r[i + 2 * half] = _mm512_maskz_unpacklo_epi64(kAll8, t[i + half], t[i + half + 2]);
      r[i + 2 * half + 1] = _mm512_maskz_unpackhi_epi64(kAll8, t[i + half], t[i + half + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_maskz_shuffle_i32x4(kAll, r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_maskz_shuffle_i32x4(kAll, r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_maskz_shuffle_i32x4(kAll, r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_maskz_shuffle_i32x4(kAll, r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_maskz_shuffle_i32x4(kAll, t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_maskz_shuffle_i32x4(kAll, t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_maskz_shuffle_i32x4(kAll, t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_maskz_shuffle_i32x4(kAll, t[i + 4], t[i + 12], 0xdd);
  }
}

FA_SIMD __mmask32 first(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// One tile of an operand whose k lie beside each other: row i holds words of line i.
FA_SIMD void words_of_lines(const uint16_t* from, int64_t stride, int64_t lines, int64_t k, __m512i (&r)[16]) {
  for (int i = 0; i < kSide; ++i)
    r[i] = i < lines ? _mm512_maskz_loadu_epi16(first(k), from + i * stride) : _mm512_setzero_si512();
}

// One tile of an operand whose lines lie beside each other: row p holds words of the pair p.
FA_SIMD void words_of_pairs(const uint16_t* from, int64_t stride, int64_t lines, int64_t k, __m512i (&r)[16]) {
  const __mmask16 here = static_cast<__mmask16>(first(std::min<int64_t>(lines, kSide)));
  for (int p = 0; p < kSide; ++p) {
    const uint16_t* low = from + 2 * p * stride;
    const __mmask16 one = 2 * p < k ? here : 0, two = 2 * p + 1 < k ? here : 0;
    const __m256i even = _mm256_maskz_loadu_epi16(one, low), odd = _mm256_maskz_loadu_epi16(two, low + stride);
    r[p] = _mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, odd), 16) | _mm512_maskz_cvtepu16_epi32(kAll, even);
  }
}

FA_SIMD void store_tile(uint32_t* to, const __m512i (&r)[16]) {
  for (int i = 0; i < kSide; ++i) _mm512_store_si512(to + i * kSide, r[i]);
}

// 16 lines of an operand, k beside each other (kAlong) or lines → the tiles of A or (kColumns) of B.
template <bool kAlong, bool kColumns>
void pack_lines(const uint16_t* from, int64_t stride, int64_t lines, int64_t k, uint32_t* to) {
  for (int64_t p = 0; p < k; p += kStep, to += kWords) {
    __m512i r[16];
    if constexpr (kAlong)
      words_of_lines(from + p, stride, lines, k - p, r);
    else
      words_of_pairs(from + p * stride, stride, lines, k - p, r);
    if constexpr (kAlong == kColumns) transpose(r);
    store_tile(to, r);
  }
}

template <bool kAlong, bool kColumns>
void pack(const uint16_t* from, int64_t stride, int64_t lines, int64_t k, uint32_t* to) {
  const int64_t line = kAlong ? stride : 1, size = ceil_div(k, kStep) * kWords;
  for (int64_t i = 0; i < lines; i += kSide, to += size) pack_lines<kAlong, kColumns>(from + i * line, stride, lines - i, k, to);
}

// Where the sums go: out = bias + sums, or out (+)= alpha * sums.
struct Target {
  float* out;
  int64_t stride, rows, columns;
  const float* bias;
  float alpha;
  bool add;
};

FA_SIMD void finish(const float* sums, const Target& to, int64_t row, int64_t column) {
  const int64_t left = to.columns - column;
  if (left <= 0) return;
  const __mmask16 mask = static_cast<__mmask16>(first(std::min<int64_t>(left, kSide)));
  const __m512 alpha = _mm512_set1_ps(to.alpha);
  const __m512 bias = to.bias ? _mm512_maskz_loadu_ps(mask, to.bias + column) : _mm512_setzero_ps();
  for (int64_t i = 0; i < std::min<int64_t>(kSide, to.rows - row); ++i) {
    float* out = to.out + (row + i) * to.stride + column;
    const __m512 start = to.add ? _mm512_maskz_loadu_ps(mask, out) : bias;
    _mm512_mask_storeu_ps(out, mask, _mm512_fmadd_ps(alpha, _mm512_load_ps(sums + i * kSide), start));
  }
}

// kSpan x kSpan results. Lines of tiles that lie past the operands are not read.
void span(const uint32_t* a, const uint32_t* b, int64_t steps, const Target& to) {
  if (to.add)
    for (int64_t r = 0; r < std::min(kSpan, to.rows); ++r)  // the results are out of the cache: they arrive while the sums are taken
      for (int64_t c = 0; c < std::min(kSpan, to.columns); c += kSide) __builtin_prefetch(to.out + r * to.stride + c, 1);
  const uint32_t* a_next = to.rows > kSide ? a + steps * kWords : a;
  const uint32_t* b_next = to.columns > kSide ? b + steps * kWords : b;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s) {
    _tile_loadd(4, a + s * kWords, kSide * 4);
    _tile_loadd(6, b + s * kWords, kSide * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b_next + s * kWords, kSide * 4);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a_next + s * kWords, kSide * 4);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[4][kWords];
  _tile_stored(0, sums[0], kSide * 4);
  _tile_stored(1, sums[1], kSide * 4);
  _tile_stored(2, sums[2], kSide * 4);
  _tile_stored(3, sums[3], kSide * 4);
  for (int i = 0; i < 4; ++i) finish(sums[i], to, i / 2 * kSide, i % 2 * kSide);
}

// Rows of A and columns of B that are packed, from the first of both.
void spans(const uint32_t* a, const uint32_t* b, int64_t steps, const Target& to) {
  for (int64_t c = 0; c < to.columns; c += kSpan)
    for (int64_t r = 0; r < to.rows; r += kSpan) {
      const float* bias = to.bias ? to.bias + c : nullptr;
      const Target here{to.out + r * to.stride + c, to.stride, to.rows - r, to.columns - c, bias, to.alpha, to.add};
      span(a + r * steps * kSide, b + c * steps * kSide, steps, here);
    }
}

}  // namespace

void product_rows_by_tiles(const Bf16Product& g) {
  const int64_t steps = ceil_div(g.k, kStep), lines = ceil_div(g.m, kSide), panels = ceil_div(g.n, kPanel);
  const Tiles a = tiles(lines * steps * kWords);
#pragma omp parallel
  {
    const Configured shapes;
    const Tiles b = tiles(kPanel / kSide * steps * kWords);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < lines; ++i)
      pack_lines<true, false>(g.a + i * kSide * g.a_stride, g.a_stride, g.m - i * kSide, g.k, a.get() + i * steps * kWords);
#pragma omp for schedule(dynamic, 4)
    for (int64_t i = 0; i < panels; ++i) {
      const int64_t column = i * kPanel, columns = std::min(kPanel, g.n - column);
      pack<true, true>(g.b + column * g.b_stride, g.b_stride, columns, g.k, b.get());
      spans(a.get(), b.get(), steps, {g.out + column, g.out_stride, g.m, columns, g.bias ? g.bias + column : nullptr, 1.0f, false});
    }
  }
}

void product_columns_by_tiles(const Bf16Product& g) {
  const int64_t lines = ceil_div(g.n, kSide), blocks = ceil_div(g.m, kBlock), most = ceil_div(std::min(kDepth, g.k), kStep);
  const Tiles b = tiles(lines * most * kWords);
#pragma omp parallel
  {
    const Configured shapes;
    const Tiles a = tiles(kBlock / kSide * most * kWords);
    for (int64_t p = 0; p < g.k; p += kDepth) {
      const int64_t depth = std::min(kDepth, g.k - p), steps = ceil_div(depth, kStep);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < lines; ++i)
        pack_lines<false, true>(g.b + p * g.b_stride + i * kSide, g.b_stride, g.n - i * kSide, depth, b.get() + i * steps * kWords);
#pragma omp for schedule(dynamic, 4)
      for (int64_t i = 0; i < blocks; ++i) {
        const int64_t row = i * kBlock, rows = std::min(kBlock, g.m - row);
        pack<false, false>(g.a + p * g.a_stride + row, g.a_stride, rows, depth, a.get());
        spans(a.get(), b.get(), steps, {g.out + row * g.out_stride, g.out_stride, rows, g.n, nullptr, g.alpha, g.add || p > 0});
      }
    }
  }
}

}  // namespace fa::FA_ISA

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
