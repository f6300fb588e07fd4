// The products of gemm.cpp on AMX, bf16 operands alone: a tile of 16 x 16 fp32 sums takes 16 x 32 of A and 32 x 16 of B an instruction.
//   layout: both operands are packed into tiles of 1 KiB, [lines / 16][k / 32][16][16 words], a word two consecutive k, zeros beside
//           and below. A tile of A has a line of the operand in a row, one of B in a column: where the operand lies the other way its
//           words are transposed on the way, 16 x 16 in registers.
//   tile:   2 x 2 sums, so that four products share two tiles of either operand; then scaled and added to the results by vectors.
//   bits:   an element is the sum of running sums over kDepth of k each (one over all of k where it is rounded to bf16), whatever the
//           rows around it, the threads and the packing. Denormals count as zeros.
// Measured on 2 cores of an Intel Xeon with AMX: see bench/bench_gemm.py.
#include <omp.h>

#include <algorithm>
#include <memory>

#include "gemm.h"
#include "simd.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512bf16"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512bf16")
#endif

#include "gemm_tiles.h"

namespace fa::FA_ISA {
namespace {

constexpr int64_t kSpan = 2 * kSide;       // rows and columns of the sums in registers
constexpr int64_t kDepth = 512;            // k of one pass: kSpan columns of b take 32 KiB
constexpr int64_t kPanel = 2 * kSpan;      // columns of b that a thread packs
constexpr int64_t kBlock = 4 * kSpan;      // rows of a that a thread packs: 128 KiB a pass
constexpr int64_t kShared = 1 << 20;       // elements packed for all threads
constexpr int64_t kTasks = 4;              // a thread, so that a slow one holds nobody up

// Memory that outlives the call, one a thread: fresh pages cost more than the packing.
class Buffer {
 public:
  uint32_t* get(int64_t wanted) {
    if (wanted > size_) {
      data_.reset(new (std::align_val_t{64}) uint32_t[wanted]);
      size_ = wanted;
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(uint32_t* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  std::unique_ptr<uint32_t[], Free> data_;
  int64_t size_ = 0;
};
thread_local Buffer shared_buffer, own_buffer;

// Lines of tiles: the first tile of the first, and words from one line to the next.
struct Packed {
  const uint32_t* at;
  int64_t line;
  Packed from(int64_t i) const { return {at + i / kSide * line, line}; }
};

// Where the sums go: (+)= alpha * (sums + bias), into fp32 or, rounded, into bf16.
struct Target {
  float* c;
  uint16_t* narrow;
  int64_t row, rows, columns;
  const float* bias;
  float alpha;
  bool add;
  Target from(int64_t r, int64_t j) const {
    const int64_t at = r * row + j;
    return {narrow ? c : c + at, narrow ? narrow + at : narrow, row, rows - r, columns - j, bias ? bias + j : bias, alpha, add};
  }
};

FA_SIMD void finish(const float* sums, const Target& to) {
  if (to.columns <= 0) return;
  const __mmask16 mask = static_cast<__mmask16>(first(std::min<int64_t>(to.columns, kSide)));
  const __m512 alpha = _mm512_set1_ps(to.alpha), bias = to.bias ? _mm512_maskz_loadu_ps(mask, to.bias) : _mm512_setzero_ps();
  for (int64_t i = 0; i < std::min<int64_t>(kSide, to.rows); ++i) {
    __m512 value = (_mm512_load_ps(sums + i * kSide) + bias) * alpha;
    if (to.narrow) {
      _mm256_mask_storeu_epi16(to.narrow + i * to.row, mask, (__m256i)_mm512_cvtneps_pbh(value));
      continue;
    }
    float* out = to.c + i * to.row;
    if (to.add) value += _mm512_maskz_loadu_ps(mask, out);
    _mm512_mask_storeu_ps(out, mask, value);
  }
}

// kSpan x kSpan results. Lines of tiles that lie past the operands are not read.
void span(const Packed& a, const Packed& b, int64_t steps, const Target& to) {
  const int64_t rows = std::min(kSpan, to.rows), columns = std::min(kSpan, to.columns);
  if (to.add)  // the results are out of the cache: they arrive while the sums are taken
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; c += kSide) __builtin_prefetch(to.c + r * to.row + c, 1);
  const uint32_t* a_next = rows > kSide ? a.at + a.line : a.at;
  const uint32_t* b_next = columns > kSide ? b.at + b.line : b.at;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps * kWords; s += kWords) {
    _tile_loadd(4, a.at + s, kSide * 4);
    _tile_loadd(6, b.at + s, kSide * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b_next + s, kSide * 4);
    _tile_dpbf16ps(1, 4, 7);
    if (rows <= kSide) continue;
    _tile_loadd(5, a_next + s, kSide * 4);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[4][kWords];
  _tile_stored(0, sums[0], kSide * 4);
  _tile_stored(1, sums[1], kSide * 4);
  _tile_stored(2, sums[2], kSide * 4);
  _tile_stored(3, sums[3], kSide * 4);
  for (int i = 0; i < 4; ++i) finish(sums[i], to.from(i / 2 * kSide, i % 2 * kSide));
}

void spans(const Packed& a, const Packed& b, int64_t steps, const Target& to) {
  for (int64_t c = 0; c < to.columns; c += kSpan)
    for (int64_t r = 0; r < to.rows; r += kSpan) span(a.from(r), b.from(c), steps, to.from(r, c));
}

Lines rows_of(const Gemm& g) { return {static_cast<const uint16_t*>(g.a), g.a_row, g.a_column}; }
Lines columns_of(const Gemm& g) { return {static_cast<const uint16_t*>(g.b), g.b_column, g.b_row}; }
int64_t depth_of(const Gemm& g) { return g.narrow ? std::max<int64_t>(g.k, 1) : kDepth; }

// Columns or rows of one task of a thread, a multiple of kSpan.
int64_t task(int64_t lines, int64_t most, int threads) {
  return std::clamp(ceil_div(ceil_div(lines, threads * kTasks), kSpan) * kSpan, kSpan, most);
}

Target target(const Gemm& g, int64_t p) {
  return {g.c, g.narrow, g.c_row, g.m, g.n, p ? nullptr : g.bias, g.alpha, g.add || p > 0};
}

// The rows [row, row + rows), packed for all threads; each thread takes panels of columns.
void share_rows(const Gemm& g, int64_t row, int64_t rows, int threads) {
  const int64_t depth = depth_of(g), width = task(g.n, kPanel, threads), most = ceil_div(std::min(depth, g.k), kStep) * kWords;
  uint32_t* const shared = shared_buffer.get(ceil_div(rows, kSide) * most);
#pragma omp parallel num_threads(threads)
  {
    const Configured shapes;
    uint32_t* const own = g.packed ? nullptr : own_buffer.get(kPanel / kSide * most);
    for (int64_t p = 0; p < std::max<int64_t>(g.k, 1); p += depth) {
      const int64_t here = std::min(depth, g.k - p), steps = ceil_div(here, kStep);
      pack_shared<false>(rows_of(g).from(row, p), rows, here, shared);
#pragma omp for schedule(dynamic, 1)
      for (int64_t j = 0; j < g.n; j += width) {
        Packed b{own, steps * kWords};
        if (g.packed) {
          const int64_t line = ceil_div(g.k, kStep) * kWords;
          b = {static_cast<const uint32_t*>(g.packed) + j / kSide * line + p / kStep * kWords, line};
        } else {
          pack<true>(columns_of(g).from(j, p), std::min(width, g.n - j), here, own);
        }
        Target to = target(g, p).from(row, j);
        to.rows = rows, to.columns = std::min(width, g.n - j);
        spans({shared, steps * kWords}, b, steps, to);
      }
    }
  }
}

// The columns [column, column + columns), packed for all threads; each thread takes blocks of rows.
void share_columns(const Gemm& g, int64_t column, int64_t columns, int threads) {
  const int64_t depth = depth_of(g), height = task(g.m, kBlock, threads), most = ceil_div(std::min(depth, g.k), kStep) * kWords;
  uint32_t* const shared = shared_buffer.get(ceil_div(columns, kSide) * most);
#pragma omp parallel num_threads(threads)
  {
    const Configured shapes;
    uint32_t* const own = own_buffer.get(kBlock / kSide * most);
    for (int64_t p = 0; p < std::max<int64_t>(g.k, 1); p += depth) {
      const int64_t here = std::min(depth, g.k - p), steps = ceil_div(here, kStep);
      pack_shared<true>(columns_of(g).from(column, p), columns, here, shared);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < g.m; i += height) {
        Target to = target(g, p).from(i, column);
        to.rows = std::min(height, g.m - i), to.columns = columns;
        pack<false>(rows_of(g).from(i, p), to.rows, here, own);
        spans({own, steps * kWords}, {shared, steps * kWords}, steps, to);
      }
    }
  }
}

}  // namespace

int64_t tile_side() { return kSide; }
int64_t tile_step() { return kStep; }

void gemm_pack_by_tiles(const Gemm& g, void* packed) {
#pragma omp parallel
  pack_shared<true>(columns_of(g), g.n, g.k, static_cast<uint32_t*>(packed));
}

void gemm_by_tiles(const Gemm& g) {
  const int threads = omp_get_max_threads();
  const int64_t most = std::max(kShared / std::max<int64_t>(std::min(depth_of(g), g.k), 1) / kSpan * kSpan, 8 * kSpan);
  // A thread's own panel of a b whose columns lie beside each other would read it in pieces.
  const bool pieces = columns_of(g).beside() && g.m >= 2 * threads * kSpan;
  if (g.packed || (g.m <= g.n && !pieces))
    for (int64_t row = 0; row < g.m; row += most) share_rows(g, row, std::min(most, g.m - row), threads);
  else
    for (int64_t column = 0; column < g.n; column += most) share_columns(g, column, std::min(most, g.n - column), threads);
}

}  // namespace fa::FA_ISA

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
