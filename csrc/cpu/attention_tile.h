// What the attention kernels are made of, on vectors of the compiled instruction set.
//
// Order of reduction, fixed for every caller: q·k adds over d = 0, 1, ... in one accumulator a (row, key); P·V adds over
// keys in order in one accumulator a (row, d). A row's numbers therefore do not depend on the rows computed beside it.
#pragma once
#include <memory>
#include <new>

#include "cpu/attention.h"
#include "cpu/simd.h"
#include "cpu/transpose.h"
#include "math/exp.h"

namespace fa::FA_ISA {

using attention::key_block;

constexpr int W = kLanes;
constexpr int tile_r = 6;                        // tile_r x tile_vectors accumulators fill the register file
constexpr int tile_vectors = kLanes == 16 ? 4 : 2;  // 32 registers, or 16

template <int h>
FA_SIMD vi swap_mask() {
  vi m{};
  for (int i = 0; i < W; ++i) m[i] = i ^ h;
  return m;
}
template <int h = W / 2>
FA_SIMD float reduce_max(vf x) {
  vf y = __builtin_shuffle(x, swap_mask<h>());
  x = x > y ? x : y;
  if constexpr (h > 1) return reduce_max<h / 2>(x);
  return x[0];
}
template <int h = W / 2>
FA_SIMD float reduce_add(vf x) {
  x = x + __builtin_shuffle(x, swap_mask<h>());
  if constexpr (h > 1) return reduce_add<h / 2>(x);
  return x[0];
}

// s[r][0..V*W) = q[r] · kt[:, column]; q rows ldq apart, kt [d][key_block].
template <int R, int V>
FA_SIMD void scores_rv(const float* q, int64_t ldq, const float* kt, int64_t d_end, float* s) {
  vf acc[R][V] = {};
  for (int64_t d = 0; d < d_end; ++d) {
    vf key[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) key[v] = load(kt + d * key_block + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vf a = splat(q[r * ldq + d]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] += a * key[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(s + r * key_block + v * W, acc[r][v]);
}

// columns: a multiple of W.
template <int R>
FA_SIMD void scores_r(const float* q, int64_t ldq, const float* kt, int64_t d_end, int64_t columns, float* s) {
  int64_t c = 0;
  for (; c + tile_vectors * W <= columns; c += tile_vectors * W) scores_rv<R, tile_vectors>(q, ldq, kt + c, d_end, s + c);
  for (; c < columns; c += W) scores_rv<R, 1>(q, ldq, kt + c, d_end, s + c);
}

// o[r][0..V*W) = o[r] * alpha[r] + sum over j < count of a[r*sr + j*sj] * b[j]
template <int R, int V>
FA_SIMD void accumulate_rv(float* o, int64_t ldo, const float* alpha, const float* a, int64_t sr, int64_t sj, const float* b, int64_t ldb,
                          int64_t count) {
  vf acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = alpha ? load(o + r * ldo + v * W) * alpha[r] : load(o + r * ldo + v * W);
  for (int64_t j = 0; j < count; ++j) {
    vf row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load(b + j * ldb + v * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      vf x = splat(a[r * sr + j * sj]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] += x * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(o + r * ldo + v * W, acc[r][v]);
}

template <int R>
FA_SIMD void accumulate_r(float* o, int64_t ldo, const float* alpha, const float* a, int64_t sr, int64_t sj, const float* b, int64_t ldb,
                         int64_t count, int64_t width) {
  int64_t c = 0;
  for (; c + tile_vectors * W <= width; c += tile_vectors * W) accumulate_rv<R, tile_vectors>(o + c, ldo, alpha, a, sr, sj, b + c, ldb, count);
  for (; c < width; c += W) accumulate_rv<R, 1>(o + c, ldo, alpha, a, sr, sj, b + c, ldb, count);
}

FA_SIMD void scores(int rows, const float* q, int64_t ldq, const float* kt, int64_t d_end, int64_t columns, float* s) {
  switch (rows) {
    case 1: return scores_r<1>(q, ldq, kt, d_end, columns, s);
    case 2: return scores_r<2>(q, ldq, kt, d_end, columns, s);
    case 3: return scores_r<3>(q, ldq, kt, d_end, columns, s);
    case 4: return scores_r<4>(q, ldq, kt, d_end, columns, s);
    case 5: return scores_r<5>(q, ldq, kt, d_end, columns, s);
    default: return scores_r<6>(q, ldq, kt, d_end, columns, s);
  }
}

FA_SIMD void accumulate(int rows, float* o, int64_t ldo, const float* alpha, const float* a, int64_t sr, int64_t sj, const float* b, int64_t ldb,
                       int64_t count, int64_t width) {
  switch (rows) {
    case 1: return accumulate_r<1>(o, ldo, alpha, a, sr, sj, b, ldb, count, width);
    case 2: return accumulate_r<2>(o, ldo, alpha, a, sr, sj, b, ldb, count, width);
    case 3: return accumulate_r<3>(o, ldo, alpha, a, sr, sj, b, ldb, count, width);
    case 4: return accumulate_r<4>(o, ldo, alpha, a, sr, sj, b, ldb, count, width);
    case 5: return accumulate_r<5>(o, ldo, alpha, a, sr, sj, b, ldb, count, width);
    default: return accumulate_r<6>(o, ldo, alpha, a, sr, sj, b, ldb, count, width);
  }
}

// The step of a transposition that swaps blocks of h among `count` vectors, and those below it.
template <int h, int count = W>
FA_SIMD void transpose_step(vf* x) {
  vi low{}, high{};
  for (int i = 0; i < W; ++i) {
    low[i] = i & h ? W + i - h : i;
    high[i] = i & h ? W + i : i + h;
  }
#pragma GCC unroll 16
  for (int i = 0; i < count; ++i)
    if (!(i & h)) {
      vf a = x[i], b = x[i + h];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + h] = __builtin_shuffle(a, b, high);
    }
  if constexpr (h > 1) transpose_step<h / 2, count>(x);
}

// Two rows of half a vector each, one behind the other, where `rows` > 1; one and zeros, or zeros, where fewer are left.
template <typename T>
FA_SIMD vf load_pair(const T* src, int64_t rows) {
  return rows > 1 ? load(src) : rows == 1 ? load_part(src, W / 2, 0.0f) : vf{};
}

// W rows of W/2 elements, without gaps → dst[d][j]: two square transpositions side by side, then the even and the odd rows interleave.
template <typename T>
FA_SIMD void transpose_halves(const T* src, int64_t rows, float* dst) {
  vf x[W / 2];
#pragma GCC unroll 8
  for (int i = 0; i < W / 2; ++i) x[i] = load_pair(src + i * W, rows - 2 * i);
  transpose_step<W / 4, W / 2>(x);
  vi interleaved;
  for (int i = 0; i < W; ++i) interleaved[i] = (i & 1) * (W / 2) + i / 2;
#pragma GCC unroll 8
  for (int d = 0; d < W / 2; ++d) store(dst + d * key_block, __builtin_shuffle(x[d], interleaved));
}

// n <= W rows of W elements → W rows of W columns, those past n zero.
template <typename T>
FA_SIMD void transpose_square(const T* src, int64_t stride, int64_t n, float* dst) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if (n == W) {
    for (int d = 0; d < W; d += 4) {
      vf x[4];
      transpose_quad<W>(src + d, stride, x);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) store(dst + (d + i) * key_block, x[i]);
    }
    return;
  }
#endif
  vf x[W];
  if (n == W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = load(src + i * stride);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) x[i] = i < n ? load(src + i * stride) : vf{};
  }
  transpose_step<W / 2>(x);
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) store(dst + i * key_block, x[i]);
}

// Rows src[0..count) of `width` elements, `stride` apart → dst[d][first + j], d < width; dst rows are key_block apart.
// Columns past first + count may be overwritten with zeros.
template <typename T>
FA_SIMD void pack_transposed(const T* src, int64_t stride, int64_t count, int64_t width, int64_t first, float* dst, const T* ahead = nullptr) {
  dst += first;
  for (int64_t j = 0; j < count; j += W) {
    const int64_t n = count - j < W ? count - j : W;
    int64_t d = 0;
    if (2 * width == W && stride == width && first + j + W <= key_block) {
      if (ahead)
        for (int64_t i = 0; i < n; i += 2) __builtin_prefetch(ahead + (j + i) * stride, 0, 2);
      transpose_halves(src + j * stride, n, dst + j);
      continue;
    }
    if (first + j + W <= key_block)  // a whole vector of columns fits
      for (; d + W <= width; d += W) {
        if (ahead)
          for (int i = 0; i < n; ++i) __builtin_prefetch(ahead + (j + i) * stride + d, 0, 2);
        transpose_square(src + j * stride + d, stride, n, dst + d * key_block + j);
      }
    for (; d < width; ++d)
      for (int64_t i = 0; i < n; ++i) dst[d * key_block + j + i] = to_float(src[(j + i) * stride + d]);
  }
}

// A line is 64 bytes.
template <typename T>
FA_SIMD void prefetch(const T* from, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i, 0, 2);
}

// Rows → dst[j][0..padded), scaled; the padding is zero.
template <typename T>
FA_SIMD void pack_rows(const T* src, int64_t stride, int64_t count, int64_t width, int64_t padded, float factor, float* dst,
                       const T* ahead = nullptr) {
  if (2 * width == W && stride == width) {
    vi low, high;
    for (int i = 0; i < W; ++i) low[i] = i < W / 2 ? i : W, high[i] = i < W / 2 ? i + W / 2 : W;
    for (int64_t j = 0; j < count; j += 2) {
      if (ahead) __builtin_prefetch(ahead + j * width, 0, 2);
      const vf pair = load_pair(src + j * width, count - j) * factor;
      store(dst + j * W, __builtin_shuffle(pair, vf{}, low));
      if (j + 1 < count) store(dst + (j + 1) * W, __builtin_shuffle(pair, vf{}, high));
    }
    return;
  }
  if (stride == width && width == padded) {  // nothing between them
    const int64_t all = count * width;
    if (ahead) prefetch(ahead, all);
    for (int64_t i = 0; i < all; i += W) store(dst + i, load(src + i) * factor);
    return;
  }
  for (int64_t j = 0; j < count; ++j, dst += padded) {
    const T* row = src + j * stride;
    int64_t d = 0;
    for (; d + W <= width; d += W) {
      if (ahead) __builtin_prefetch(ahead + j * stride + d, 0, 2);
      store(dst + d, load(row + d) * factor);
    }
    for (; d < width; ++d) dst[d] = to_float(row[d]) * factor;
    for (; d < padded; ++d) dst[d] = 0.0f;
  }
}

FA_SIMD int64_t padded(int64_t width) { return (width + W - 1) / W * W; }

class Scratch {  // 64-byte aligned floats, one allocation a thread
 public:
  explicit Scratch(size_t floats) : data_(static_cast<float*>(::operator new(floats * sizeof(float), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* take(int64_t floats) {
    float* out = data_ + used_;
    used_ += round(floats);
    return out;
  }
  static int64_t round(int64_t floats) { return (floats + 15) / 16 * 16; }

 private:
  float* data_;
  int64_t used_ = 0;
};

}  // namespace fa::FA_ISA
