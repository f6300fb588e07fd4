// Tiles of AMX: their configuration, and how an operand becomes tiles. For sources that are compiled with amx-tile (gemm_tiles.cpp).
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace fa::FA_ISA {
namespace {

constexpr int kSide = 16;                  // lines of a tile, and the words of each
constexpr int64_t kWords = kSide * kSide;  // of a tile
constexpr int64_t kStep = 2 * kSide;       // k of a tile

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

// The lines of an operand: rows of a or columns of b.
struct Lines {
  const uint16_t* at;
  int64_t line, step;  // from one to the next, and from one k to the next
  Lines from(int64_t i, int64_t p) const { return {at + i * line + p * step, line, step}; }
  bool beside() const { return line == 1 && step != 1; }
};

// One tile where k lie beside each other: row i holds words of line i.
FA_SIMD void words_of_lines(const Lines& x, int64_t lines, int64_t k, __m512i (&r)[16]) {
  for (int i = 0; i < kSide; ++i)
    r[i] = i < lines ? _mm512_maskz_loadu_epi16(first(k), x.at + i * x.line) : _mm512_setzero_si512();
}

// One tile where lines lie beside each other: row p holds words of the pair p.
FA_SIMD void words_of_pairs(const Lines& x, int64_t lines, int64_t k, __m512i (&r)[16]) {
  const __mmask16 here = static_cast<__mmask16>(first(std::min<int64_t>(lines, kSide)));
  for (int p = 0; p < kSide; ++p) {
    const uint16_t* low = x.at + 2 * p * x.step;
    const __mmask16 one = 2 * p < k ? here : 0, two = 2 * p + 1 < k ? here : 0;
    const __m256i even = _mm256_maskz_loadu_epi16(one, low), odd = _mm256_maskz_loadu_epi16(two, low + x.step);
    r[p] = _mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, odd), 16) | _mm512_maskz_cvtepu16_epi32(kAll, even);
  }
}

// One tile of any strides, as words_of_lines.
void words_apart(const Lines& x, int64_t lines, int64_t k, __m512i (&r)[16]) {
  alignas(64) uint16_t words[kSide][kStep] = {};
  for (int64_t i = 0; i < std::min<int64_t>(lines, kSide); ++i)
    for (int64_t p = 0; p < std::min(k, kStep); ++p) words[i][p] = x.at[i * x.line + p * x.step];
  for (int i = 0; i < kSide; ++i) r[i] = _mm512_load_si512(words[i]);
}

// One tile of a or (kColumns) of b.
template <bool kColumns>
void pack_tile(const Lines& x, int64_t lines, int64_t k, uint32_t* to) {
  __m512i r[16];
  if (x.beside())
    words_of_pairs(x, lines, k, r);
  else if (x.step == 1)
    words_of_lines(x, lines, k, r);
  else
    words_apart(x, lines, k, r);
  if (x.beside() != kColumns) transpose(r);
  for (int j = 0; j < kSide; ++j) _mm512_store_si512(to + j * kSide, r[j]);
}

// `lines` lines, k deep → their tiles.
template <bool kColumns>
void pack(const Lines& x, int64_t lines, int64_t k, uint32_t* to) {
  for (int64_t i = 0; i < lines; i += kSide)
    for (int64_t p = 0; p < k; p += kStep, to += kWords) pack_tile<kColumns>(x.from(i, p), lines - i, k - p, to);
}

// The same by all threads of the team, each reading memory in order.
template <bool kColumns>
void pack_shared(const Lines& x, int64_t lines, int64_t k, uint32_t* to) {
  const int64_t line = ceil_div(k, kStep) * kWords;
  if (x.beside()) {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < k; p += kStep)
      for (int64_t i = 0; i < lines; i += kSide)
        pack_tile<kColumns>(x.from(i, p), lines - i, k - p, to + i / kSide * line + p / kStep * kWords);
  } else {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < lines; i += kSide)
      pack<kColumns>(x.from(i, 0), std::min<int64_t>(kSide, lines - i), k, to + i / kSide * line);
  }
}

}  // namespace
}  // namespace fa::FA_ISA
