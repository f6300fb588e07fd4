// c (+)= alpha * (a * b + bias), fp32 sums.
//   tile:    kRows x kPanel sums stay in registers over kDepth of k: 12 vectors, two of b and one of a fill AVX2's sixteen registers.
//   packing: the smaller operand is packed once a kDepth for all threads, the larger by the thread that uses it, bf16 widened on the way.
//            Both are read in order: b's panel from the first-level cache, a's block from the second, the next panel asked for meanwhile.
//   passes:  what is packed for all has two halves in turn, so that a pass over k waits for the threads once: a thread that is done with
//            its results packs for the next pass.
//   bits:    an element is the sum of running sums over kDepth of k each, whatever m, n and the number of threads are, and
//            whether b was packed before. An element of one row has therefore the same bits in any batch.
// Measured on 2 cores of an AMD EPYC with AVX2 (peak 157 GFLOP/s): see bench/bench_gemm.py. On two of the first generation (peak 80), with
// and without asking ahead in turn, results into memory that was there: 4 to 8 % for 64 rows of weights that wait in memory, 16 to 20 for 16.
#include "gemm.h"

#include <omp.h>

#include <algorithm>
#include <memory>

#include "simd.h"
#include "transpose.h"

namespace fa::FA_ISA {
namespace {

constexpr int kRows = 6, kVectors = 2;
constexpr int kPanel = kVectors * kLanes;
constexpr int64_t kDepth = 512;     // k of one pass: a panel of b takes 32 KiB
constexpr int64_t kBlock = 96;      // rows of a block of a: with kDepth 192 KiB
constexpr int64_t kChunk = 512;     // columns of a chunk of b that a thread packs
constexpr int64_t kMost = 1536;     // rows or columns of the operand that is packed for all threads: 3 MiB a pass, twice
constexpr int64_t kTasks = 4;       // a thread, so that a slow one holds nobody up

// Memory that outlives the call, one a thread: fresh pages cost more than the packing.
struct Buffer {
  std::unique_ptr<float[]> data;
  int64_t size = 0;
  float* get(int64_t wanted) {
    if (wanted > size) {
      data.reset(new float[wanted]);
      size = wanted;
    }
    return data.get();
  }
};
thread_local Buffer shared_buffer, own_buffer;

// `width` <= kWidth lines of k elements, k contiguous → [k][kWidth], zeros beside.
template <int kWidth, typename T>
void pack_along_k(const T* from, int64_t line, int64_t width, int64_t k, float* to) {
  int64_t p = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (width == kWidth)
    for (; p + 4 + (kWidth % 8 != 0) <= k; p += 4)  // a narrow line is written 8 wide: the next one covers what is too much
      for (int c = 0; c < kWidth; c += 8) {
        vf r[4];
        transpose_quad<kWidth % 8 ? kWidth % 8 : 8>(from + c * line + p, line, r);
        for (int i = 0; i < 4; ++i) store(to + (p + i) * kWidth + c, r[i]);
      }
#endif
  for (; p < k; ++p)
    for (int c = 0; c < kWidth; ++c) to[p * kWidth + c] = c < width ? to_float(from[c * line + p]) : 0.0f;
}

// The same where the lines lie beside each other: step elements from one k to the next. Beside them in memory: `lines` with these.
template <int kWidth, typename T>
void pack_across_k(const T* from, int64_t line, int64_t step, int64_t width, int64_t lines, int64_t k, float* to) {
  constexpr int kWide = (kWidth + kLanes - 1) / kLanes * kLanes, kTooWide = (kWide - 1) / kWidth;  // k that are written over
  int64_t p = 0;
  if (line == 1 && lines >= kWide)
    for (; p + kTooWide < k; ++p)
      for (int c = 0; c < kWide; c += kLanes) store(to + p * kWidth + c, load(from + p * step + c));
  if (line == 1 && width == kWidth)
    for (; p < k; ++p)
#pragma GCC unroll 16
      for (int c = 0; c < kWidth; ++c) to[p * kWidth + c] = to_float(from[p * step + c]);
  for (; p < k; ++p)
    for (int c = 0; c < kWidth; ++c) to[p * kWidth + c] = c < width ? to_float(from[c * line + p * step]) : 0.0f;
}

// `count` lines (rows of a or columns of b), of `lines` that there are from the first → [ceil(count / kWidth)][k][kWidth].
template <int kWidth, typename T>
void pack_lines(const T* from, int64_t line, int64_t step, int64_t count, int64_t lines, int64_t k, float* to) {
  for (int64_t first = 0; first < count; first += kWidth, to += k * kWidth) {
    const int64_t width = std::min<int64_t>(kWidth, count - first);
    step == 1 ? pack_along_k<kWidth>(from + first * line, line, width, k, to)
              : pack_across_k<kWidth>(from + first * line, line, step, width, lines - first, k, to);
  }
}

struct Target {
  float* c;
  int64_t row, columns;  // columns <= kPanel
  const float* bias;     // of the panel's columns, or null
  float alpha;
  bool add;
};

// What is read after these tiles: `lines` of the cache are asked for every kAsk of k.
constexpr int kAsk = 8;
struct Ahead {
  const char* at;
  int lines;
};

template <int kCount, typename B>
FA_SIMD void step(const float* a, const B* b, vf (&sums)[kCount][kVectors]) {
  vf line[kVectors];
  for (int v = 0; v < kVectors; ++v) line[v] = load(b + v * kLanes);
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r][v] += splat(a[r]) * line[v];
}

template <int kCount, typename B>
void tile(const float* a, const B* b, int64_t k, const Target& to, Ahead ahead) {
  for (int r = 0; r < kCount; ++r)  // the results may be out of the cache: they arrive while the sums are taken
    for (int64_t c = 0; c < to.columns; c += 16) __builtin_prefetch(to.c + r * to.row + c, 1);
  vf sums[kCount][kVectors] = {};
  int64_t p = 0;
  for (; p + kAsk <= k; p += kAsk) {
    for (int i = 0; i < ahead.lines; ++i, ahead.at += 64) __builtin_prefetch(ahead.at);
#pragma GCC unroll 8
    for (int q = 0; q < kAsk; ++q, a += kRows, b += kPanel) step(a, b, sums);
  }
  for (; p < k; ++p, a += kRows, b += kPanel) step(a, b, sums);
  for (int r = 0; r < kCount; ++r) {
    float* out = to.c + r * to.row;
    for (int v = 0; v < kVectors; ++v, out += kLanes) {
      const int64_t left = to.columns - v * kLanes;
      if (left <= 0) break;
      vf value = sums[r][v];
      if (left >= kLanes) {
        if (to.bias) value += load(to.bias + v * kLanes);
        value *= to.alpha;
        if (to.add) value += load(out);
        store(out, value);
      } else {
        if (to.bias) value += load_part(to.bias + v * kLanes, left, 0.0f);
        value *= to.alpha;
        if (to.add) value += load_part(out, left, 0.0f);
        store_part(out, value, left);
      }
    }
  }
}

template <typename B>
void tile_of(int64_t rows, const float* a, const B* b, int64_t k, const Target& to, Ahead ahead) {
  switch (rows) {
    case 1: return tile<1>(a, b, k, to, ahead);
    case 2: return tile<2>(a, b, k, to, ahead);
    case 3: return tile<3>(a, b, k, to, ahead);
    case 4: return tile<4>(a, b, k, to, ahead);
    case 5: return tile<5>(a, b, k, to, ahead);
    default: return tile<kRows>(a, b, k, to, ahead);
  }
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One pass over a range of k, for rows [row, row + rows) and columns [column, column + columns) of c: a and b are packed. While the tiles
// of a panel are multiplied the next panel comes into the cache, some lines a tile: weights of a decode step wait in memory.
template <typename B>
void block(const Gemm& g, int64_t depth, bool first, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* a,
           const B* b, int64_t b_panel) {
  const int64_t bytes = depth * kPanel * sizeof(B), asks = std::max<int64_t>(depth / kAsk, 1);
  for (int64_t i = 0; i < rows; i += kBlock) {
    const int64_t here = std::min(kBlock, rows - i), tiles = (here + kRows - 1) / kRows;
    const int lines = static_cast<int>((bytes / 64 + tiles * asks - 1) / (tiles * asks));
    for (int64_t j = 0; j < columns; j += kPanel) {
      const B* panel = b + j / kPanel * b_panel;
      const B* next = j + kPanel < columns ? panel + b_panel : b;
      const int64_t wanted = j + kPanel < columns || i + kBlock < rows ? bytes : 0;
      const float* bias = g.bias && first ? g.bias + column + j : nullptr;
      float* c = g.c + (row + i) * g.c_row + column + j;
      const Target to{c, g.c_row, std::min<int64_t>(kPanel, columns - j), bias, g.alpha, g.add || !first};
      for (int64_t r = 0, asked = 0; r < here; r += kRows, asked += lines * asks * 64) {
        Target at = to;
        at.c += r * g.c_row;
        const Ahead ahead{reinterpret_cast<const char*>(next) + asked, asked < wanted ? lines : 0};
        tile_of(std::min<int64_t>(kRows, here - r), a + (i + r) * depth, panel, depth, at, ahead);
      }
    }
  }
}

// Two halves of a buffer in turn: while some threads still read one, others fill the other for the next range of k.
struct Halves {
  float* at;
  int64_t half;
  float* of(int64_t p) const { return at + p / kDepth % 2 * half; }
};
Halves halves(int64_t lines, int64_t k) {
  const int64_t half = lines * std::min(kDepth, k) + 8;
  return {shared_buffer.get(k > kDepth ? 2 * half : half), half};
}

// The rows [row, row + rows) of c, packed for all threads; each thread takes chunks of columns.
template <typename T>
void share_rows(const Gemm& g, int64_t row, int64_t rows, int threads) {
  const int64_t chunk = std::clamp(round_up((g.n + threads * kTasks - 1) / (threads * kTasks), kPanel), (int64_t)kPanel, kChunk);
  const int64_t tiles = (rows + kRows - 1) / kRows, chunks = (g.n + chunk - 1) / chunk;
  const Halves shared = halves(tiles * kRows, g.k);
#pragma omp parallel num_threads(threads)
  for (int64_t p = 0; p < std::max<int64_t>(g.k, 1); p += kDepth) {
    const int64_t depth = std::min(kDepth, g.k - p);
    float* const packed = shared.of(p);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = row + t * kRows, here = std::min<int64_t>(kRows, rows - t * kRows);
      pack_lines<kRows>(static_cast<const T*>(g.a) + first * g.a_row + p * g.a_column, g.a_row, g.a_column, here, g.m - first, depth,
                        packed + t * kRows * depth);
    }
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t column = i * chunk, columns = std::min(chunk, g.n - column);
      if (g.packed) {
        const T* b = static_cast<const T*>(g.packed) + column * g.k + p * kPanel;
        block(g, depth, p == 0, row, rows, column, columns, packed, b, g.k * kPanel);
        continue;
      }
      float* const own = own_buffer.get(round_up(columns, kPanel) * depth + 8);
      pack_lines<kPanel>(static_cast<const T*>(g.b) + column * g.b_column + p * g.b_row, g.b_column, g.b_row, columns, g.n - column, depth, own);
      block(g, depth, p == 0, row, rows, column, columns, packed, static_cast<const float*>(own), depth * kPanel);
    }
  }
}

// The columns [column, column + columns) of c, packed for all threads; each thread takes blocks of rows.
template <typename T>
void share_columns(const Gemm& g, int64_t column, int64_t columns, int threads) {
  const int64_t rows = std::clamp(round_up((g.m + threads * kTasks - 1) / (threads * kTasks), kRows), (int64_t)kRows, kBlock);
  const int64_t panels = (columns + kPanel - 1) / kPanel, blocks = (g.m + rows - 1) / rows;
  const Halves shared = halves(panels * kPanel, g.k);
#pragma omp parallel num_threads(threads)
  for (int64_t p = 0; p < std::max<int64_t>(g.k, 1); p += kDepth) {
    const int64_t depth = std::min(kDepth, g.k - p);
    float* const packed = shared.of(p);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < panels; ++j) {
      const int64_t first = column + j * kPanel, here = std::min<int64_t>(kPanel, columns - j * kPanel);
      pack_lines<kPanel>(static_cast<const T*>(g.b) + first * g.b_column + p * g.b_row, g.b_column, g.b_row, here, g.n - first, depth,
                         packed + j * kPanel * depth);
    }
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t row = i * rows, here = std::min(rows, g.m - row);
      float* const own = own_buffer.get(round_up(here, kRows) * depth + 8);
      pack_lines<kRows>(static_cast<const T*>(g.a) + row * g.a_row + p * g.a_column, g.a_row, g.a_column, here, g.m - row, depth, own);
      block(g, depth, p == 0, row, here, column, columns, own, static_cast<const float*>(packed), depth * kPanel);
    }
  }
}

// Lines of one share: as alike as they can be, so that none is left with few.
int64_t share(int64_t lines, int64_t most, int64_t to) {
  const int64_t shares = std::max<int64_t>((lines + most - 1) / most, 1);
  return std::max(round_up((lines + shares - 1) / shares, to), to);
}

template <typename T>
void run(const Gemm& g, int threads) {
  if (g.m <= g.n || g.packed)
    for (int64_t row = 0, most = share(g.m, kMost, kRows); row < g.m; row += most) share_rows<T>(g, row, std::min(most, g.m - row), threads);
  else
    for (int64_t column = 0, most = share(g.n, kMost, kPanel); column < g.n; column += most)
      share_columns<T>(g, column, std::min(most, g.n - column), threads);
}

template <typename T>
void pack_all(const Gemm& g, T* packed) {
  const int64_t panels = (g.n + kPanel - 1) / kPanel;
#pragma omp parallel for schedule(static)
  for (int64_t j = 0; j < panels; ++j) {
    const int64_t first = j * kPanel, width = std::min<int64_t>(kPanel, g.n - first);
    const T* from = static_cast<const T*>(g.b) + first * g.b_column;
    T* to = packed + first * g.k;
    for (int64_t p = 0; p < g.k; ++p)
      for (int64_t c = 0; c < kPanel; ++c) to[p * kPanel + c] = c < width ? from[c * g.b_column + p * g.b_row] : T{};
  }
}

}  // namespace

int64_t gemm_panel() { return kPanel; }

void gemm_pack(const Gemm& g, void* packed) {
  g.bf16 ? pack_all(g, static_cast<uint16_t*>(packed)) : pack_all(g, static_cast<float*>(packed));
}

// One read of the part, one read and one write of the total: torch widens the part into memory of its own first.
void add_widened(float* total, const uint16_t* part, int64_t size, float alpha) {
  constexpr int64_t kBlock = 8192;
#pragma omp parallel for schedule(static)
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = begin + kBlock < size ? begin + kBlock : size;
    float* __restrict sum = total;
    const uint16_t* __restrict from = part;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) sum[i] += alpha * to_float(from[i]);
  }
}

void gemm(const Gemm& g) {
  const int threads = omp_get_max_threads();
  g.bf16 ? run<uint16_t>(g, threads) : run<float>(g, threads);
}

}  // namespace fa::FA_ISA
