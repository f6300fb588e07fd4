// c (+)= alpha * (a * b + bias), fp32 sums.
//   tile:    kRows x kPanel sums stay in registers over kDepth of k: 12 vectors, two of b and one of a fill AVX2's sixteen registers.
//   packing: the smaller operand is packed once a kDepth for all threads, the larger by the thread that uses it, bf16 widened on the way.
//            Both are read in order: b's panel from the first-level cache, a's block from the second.
//   bits:    an element is the sum of running sums over kDepth of k each, whatever m, n and the number of threads are, and
//            whether b was packed before. An element of one row has therefore the same bits in any batch.
// Measured on 2 cores of an AMD EPYC with AVX2 (peak 157 GFLOP/s): see bench/bench_gemm.py.
#include "gemm.h"

#include <omp.h>

#include <algorithm>
#include <memory>

#include "simd.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fa::FA_ISA {
namespace {

constexpr int kRows = 6, kVectors = 2;
constexpr int kPanel = kVectors * kLanes;
constexpr int64_t kDepth = 512;     // k of one pass: a panel of b takes 32 KiB
constexpr int64_t kBlock = 96;      // rows of a block of a: with kDepth 192 KiB
constexpr int64_t kChunk = 512;     // columns of a chunk of b that a thread packs
constexpr int64_t kMost = 4032;     // rows or columns of the operand that is packed for all threads: at most 8 MiB
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

#if defined(__AVX2__) && !defined(__AVX512F__)
FA_SIMD void transpose(vf (&r)[8]) {
  __m256 t[8], u[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps((__m256)r[2 * i], (__m256)r[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    u[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
    u[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
    u[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
    u[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = (vf)_mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    r[i + 4] = (vf)_mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
constexpr bool kTransposes = true;
#else
constexpr bool kTransposes = false;
#endif

// `width` <= kWidth lines of k elements, k contiguous → [k][kWidth], zeros beside.
template <int kWidth, typename T>
void pack_along_k(const T* from, int64_t line, int64_t width, int64_t k, float* to) {
  int64_t p = 0;
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (kTransposes && width == kWidth)
    for (; p + 8 + (kWidth % 8 != 0) <= k; p += 8)  // a narrow line is written 8 wide: the next one covers what is too much
      for (int c = 0; c < kWidth; c += 8) {
        vf r[8];
        for (int i = 0; i < 8; ++i) r[i] = c + i < kWidth ? load(from + (c + i) * line + p) : vf{};
        transpose(r);
        for (int i = 0; i < 8; ++i) store(to + (p + i) * kWidth + c, r[i]);
      }
#endif
  for (; p < k; ++p)
    for (int c = 0; c < kWidth; ++c) to[p * kWidth + c] = c < width ? to_float(from[c * line + p]) : 0.0f;
}

// The same where the lines lie beside each other: step elements from one k to the next.
template <int kWidth, typename T>
void pack_across_k(const T* from, int64_t line, int64_t step, int64_t width, int64_t k, float* to) {
  if (line == 1 && width == kWidth) {
    for (int64_t p = 0; p < k; ++p)
#pragma GCC unroll 16
      for (int c = 0; c < kWidth; ++c) to[p * kWidth + c] = to_float(from[p * step + c]);
    return;
  }
  for (int64_t p = 0; p < k; ++p)
    for (int c = 0; c < kWidth; ++c) to[p * kWidth + c] = c < width ? to_float(from[c * line + p * step]) : 0.0f;
}

// `count` lines (rows of a or columns of b) → [ceil(count / kWidth)][k][kWidth].
template <int kWidth, typename T>
void pack_lines(const T* from, int64_t line, int64_t step, int64_t count, int64_t k, float* to) {
  for (int64_t first = 0; first < count; first += kWidth, to += k * kWidth) {
    const int64_t width = std::min<int64_t>(kWidth, count - first);
    step == 1 ? pack_along_k<kWidth>(from + first * line, line, width, k, to)
              : pack_across_k<kWidth>(from + first * line, line, step, width, k, to);
  }
}

struct Target {
  float* c;
  int64_t row, columns;  // columns <= kPanel
  const float* bias;     // of the panel's columns, or null
  float alpha;
  bool add;
};

template <int kCount, typename B>
void tile(const float* a, const B* b, int64_t k, const Target& to) {
  for (int r = 0; r < kCount; ++r)  // the results may be out of the cache: they arrive while the sums are taken
    for (int64_t c = 0; c < to.columns; c += 16) __builtin_prefetch(to.c + r * to.row + c, 1);
  vf sums[kCount][kVectors] = {};
  for (int64_t p = 0; p < k; ++p, a += kRows, b += kPanel) {
    vf line[kVectors];
    for (int v = 0; v < kVectors; ++v) line[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] += splat(a[r]) * line[v];
  }
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
void tile_of(int64_t rows, const float* a, const B* b, int64_t k, const Target& to) {
  switch (rows) {
    case 1: return tile<1>(a, b, k, to);
    case 2: return tile<2>(a, b, k, to);
    case 3: return tile<3>(a, b, k, to);
    case 4: return tile<4>(a, b, k, to);
    case 5: return tile<5>(a, b, k, to);
    default: return tile<kRows>(a, b, k, to);
  }
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// One pass over a range of k, for rows [row, row + rows) and columns [column, column + columns) of c: a and b are packed.
template <typename B>
void block(const Gemm& g, int64_t depth, bool first, int64_t row, int64_t rows, int64_t column, int64_t columns, const float* a,
           const B* b, int64_t b_panel) {
  for (int64_t i = 0; i < rows; i += kBlock)
    for (int64_t j = 0; j < columns; j += kPanel) {
      const B* panel = b + j / kPanel * b_panel;
      const float* bias = g.bias && first ? g.bias + column + j : nullptr;
      float* c = g.c + (row + i) * g.c_row + column + j;
      const Target to{c, g.c_row, std::min<int64_t>(kPanel, columns - j), bias, g.alpha, g.add || !first};
      const int64_t here = std::min(kBlock, rows - i);
      for (int64_t r = 0; r < here; r += kRows) {
        Target at = to;
        at.c += r * g.c_row;
        tile_of(std::min<int64_t>(kRows, here - r), a + (i + r) * depth, panel, depth, at);
      }
    }
}

// The rows [row, row + rows) of c, packed for all threads; each thread takes chunks of columns.
template <typename T>
void share_rows(const Gemm& g, int64_t row, int64_t rows, int threads) {
  const int64_t chunk = std::clamp(round_up((g.n + threads * kTasks - 1) / (threads * kTasks), kPanel), (int64_t)kPanel, kChunk);
  const int64_t tiles = (rows + kRows - 1) / kRows, chunks = (g.n + chunk - 1) / chunk;
  float* const packed = shared_buffer.get(tiles * kRows * std::min(kDepth, g.k) + 8);
#pragma omp parallel num_threads(threads)
  for (int64_t p = 0; p < std::max<int64_t>(g.k, 1); p += kDepth) {
    const int64_t depth = std::min(kDepth, g.k - p);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tiles; ++t)
      pack_lines<kRows>(static_cast<const T*>(g.a) + (row + t * kRows) * g.a_row + p * g.a_column, g.a_row, g.a_column,
                        std::min<int64_t>(kRows, rows - t * kRows), depth, packed + t * kRows * depth);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t column = i * chunk, columns = std::min(chunk, g.n - column);
      if (g.packed) {
        const T* b = static_cast<const T*>(g.packed) + column * g.k + p * kPanel;
        block(g, depth, p == 0, row, rows, column, columns, packed, b, g.k * kPanel);
        continue;
      }
      float* const own = own_buffer.get(round_up(columns, kPanel) * depth + 8);
      pack_lines<kPanel>(static_cast<const T*>(g.b) + column * g.b_column + p * g.b_row, g.b_column, g.b_row, columns, depth, own);
      block(g, depth, p == 0, row, rows, column, columns, packed, static_cast<const float*>(own), depth * kPanel);
    }
  }
}

// The columns [column, column + columns) of c, packed for all threads; each thread takes blocks of rows.
template <typename T>
void share_columns(const Gemm& g, int64_t column, int64_t columns, int threads) {
  const int64_t rows = std::clamp(round_up((g.m + threads * kTasks - 1) / (threads * kTasks), kRows), (int64_t)kRows, kBlock);
  const int64_t panels = (columns + kPanel - 1) / kPanel, blocks = (g.m + rows - 1) / rows;
  float* const packed = shared_buffer.get(panels * kPanel * std::min(kDepth, g.k) + 8);
#pragma omp parallel num_threads(threads)
  for (int64_t p = 0; p < std::max<int64_t>(g.k, 1); p += kDepth) {
    const int64_t depth = std::min(kDepth, g.k - p);
#pragma omp for schedule(static)
    for (int64_t j = 0; j < panels; ++j)
      pack_lines<kPanel>(static_cast<const T*>(g.b) + (column + j * kPanel) * g.b_column + p * g.b_row, g.b_column, g.b_row,
                         std::min<int64_t>(kPanel, columns - j * kPanel), depth, packed + j * kPanel * depth);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t row = i * rows, here = std::min(rows, g.m - row);
      float* const own = own_buffer.get(round_up(here, kRows) * depth + 8);
      pack_lines<kRows>(static_cast<const T*>(g.a) + row * g.a_row + p * g.a_column, g.a_row, g.a_column, here, depth, own);
      block(g, depth, p == 0, row, here, column, columns, own, static_cast<const float*>(packed), depth * kPanel);
    }
  }
}

template <typename T>
void run(const Gemm& g, int threads) {
  if (g.m <= g.n || g.packed)
    for (int64_t row = 0; row < g.m; row += kMost) share_rows<T>(g, row, std::min(kMost, g.m - row), threads);
  else
    for (int64_t column = 0; column < g.n; column += kMost) share_columns<T>(g, column, std::min(kMost, g.n - column), threads);
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
