// Inverse-CDF sampling in vocabulary order: w_j = e^(z_j - max), block sums of w, the block where the running sum passes u * total,
// then the token inside it. One read of the row from memory (three from the cache).
// Truncation finds one threshold on w by a radix histogram over w's exponent and top 3 mantissa bits (counts and mass of 1017 buckets);
// only the bucket that holds the border is sorted. Tokens equal to the last one kept are kept too.
// Sums are fp32 inside a block of 512 tokens, fp64 across.
#include "sample.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <functional>
#include <vector>

#include "../math/softmax.h"
#include "simd.h"

namespace fa::FA_ISA {
namespace {

constexpr int64_t kBlock = 512;                    // tokens of one partial sum
constexpr int kShift = 20;                         // of a weight's bits: what is left is its bucket
constexpr int kBuckets = (0x3F800000 >> kShift) + 1;  // 1.0, the largest weight, is in the last one

struct Soften {
  float softcap, inv_softcap, inv_temperature;
};

struct Peak {
  float max;
  bool sound;  // no NaN, and the maximum is finite
};

template <typename T>
Peak peak(const T* x, int64_t n) {
  vf m[2] = {splat(-INFINITY), splat(-INFINITY)};
  vi nan[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes)
    for (int c = 0; c < 2; ++c) {
      const vf v = load(x + i + c * kLanes);
      nan[c] |= v != v;
      m[c] = max(v, m[c]);
    }
  for (; i < n; i += kLanes) {
    const vf v = n - i < kLanes ? load_part(x + i, n - i, -INFINITY) : load(x + i);
    nan[0] |= v != v;
    m[0] = max(v, m[0]);
  }
  nan[0] |= nan[1];
  bool any = false;
  for (int lane = 0; lane < kLanes; ++lane) any |= nan[0][lane] != 0;
  const float best = max(max(m[0], m[1]));
  return {best, !any && std::isfinite(best)};
}

// e^((cap(x) - top) / temperature), top = cap(max x). The difference comes first: x / T - top / T in one rounding can be above 0 at a
// small T, and a weight above 1 has no bucket. The soft-cap's rounding may put x past top by itself.
FA_SIMD vf weight(vf x, const Soften& s, float top) {
  const vf down = math::soften<vu, vf>(x, s.softcap, s.inv_softcap, 1.0f) - top;
  const vf w = math::exp<vu, vf>((down > 0.0f ? vf{} : down) * s.inv_temperature);
  return x == -INFINITY ? vf{} : w;  // the soft-cap would lift -inf to -softcap
}

// What a thread keeps from row to row.
struct Scratch {
  std::vector<float> weights, border;
  std::vector<double> sums;
  std::vector<int64_t> counts;
  std::vector<double> masses;
};

// weights[0:n] of one row, and the sum of each block.
template <typename T>
void weigh(const T* x, int64_t n, const Soften& s, float top, Scratch& scratch) {
  scratch.weights.resize(n + kLanes);
  scratch.sums.resize((n + kBlock - 1) / kBlock);
  float* w = scratch.weights.data();
  for (int64_t begin = 0, block = 0; begin < n; begin += kBlock, ++block) {
    const int64_t end = std::min(begin + kBlock, n);
    vf total[2] = {};
    int64_t i = begin;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes)
      for (int c = 0; c < 2; ++c) {
        const vf v = weight(load(x + i + c * kLanes), s, top);
        store(w + i + c * kLanes, v);
        total[c] += v;
      }
    for (; i < end; i += kLanes) {
      const vf v = weight(end - i < kLanes ? load_part(x + i, end - i, -INFINITY) : load(x + i), s, top);
      store(w + i, v);
      total[0] += v;
    }
    scratch.sums[block] = sum(total[0] + total[1]);
  }
}

// The sum of each block's weights that reach the threshold, in the order of `weigh`: with nothing cut, the same bits.
void cut(int64_t n, float threshold, Scratch& scratch) {
  float* w = scratch.weights.data();
  for (int64_t begin = 0, block = 0; begin < n; begin += kBlock, ++block) {
    const int64_t end = std::min(begin + kBlock, n);
    vf total[2] = {};
    int64_t i = begin;
    auto keep = [&](int64_t at, int c) {
      vf v = end - at < kLanes ? load_part(w + at, end - at, 0.0f) : load(w + at);
      v = v >= threshold ? v : vf{};
      if (end - at < kLanes)
        store_part(w + at, v, end - at);
      else
        store(w + at, v);
      total[c] += v;
    };
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) keep(i, 0), keep(i + kLanes, 1);
    for (; i < end; i += kLanes) keep(i, 0);
    scratch.sums[block] = sum(total[0] + total[1]);
  }
}

int bucket(float w) {
  uint32_t bits;
  std::memcpy(&bits, &w, sizeof bits);
  return static_cast<int>(bits >> kShift);
}

void count(int64_t n, Scratch& scratch) {
  scratch.counts.assign(kBuckets, 0);
  scratch.masses.assign(kBuckets, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    const float w = scratch.weights[i];
    const int b = bucket(w);
    ++scratch.counts[b];
    scratch.masses[b] += w;
  }
}

// The weights of one bucket that reach `floor`, largest first.
const std::vector<float>& sorted(int64_t n, int b, float floor, Scratch& scratch) {
  scratch.border.clear();
  for (int64_t i = 0; i < n; ++i)
    if (bucket(scratch.weights[i]) == b && scratch.weights[i] >= floor) scratch.border.push_back(scratch.weights[i]);
  std::sort(scratch.border.begin(), scratch.border.end(), std::greater<float>());
  return scratch.border;
}

struct Border {
  float threshold = 0;  // the smallest weight kept
  int bucket = 0;       // where it is
  double mass = 0;      // of everything kept
};

Border top_k(int64_t n, int64_t k, Scratch& scratch) {
  Border out;
  int64_t above = 0;
  for (out.bucket = kBuckets - 1; out.bucket > 0 && above + scratch.counts[out.bucket] < k; --out.bucket) {
    above += scratch.counts[out.bucket];
    out.mass += scratch.masses[out.bucket];
  }
  const std::vector<float>& candidates = sorted(n, out.bucket, 0.0f, scratch);
  if (!candidates.empty()) out.threshold = candidates[std::min<int64_t>(k - above, candidates.size()) - 1];
  for (float w : candidates)
    if (w >= out.threshold) out.mass += w;
  return out;
}

// The nucleus of what `kept` left.
float top_p(int64_t n, float p, const Border& kept, Scratch& scratch) {
  const double wanted = static_cast<double>(p) * kept.mass;
  double above = 0;
  int b = kBuckets - 1;
  for (; b > kept.bucket && above + scratch.masses[b] < wanted; --b) above += scratch.masses[b];
  const std::vector<float>& candidates = sorted(n, b, kept.threshold, scratch);
  for (float w : candidates) {
    above += w;
    if (above >= wanted) return w;
  }
  return candidates.empty() ? kept.threshold : candidates.back();
}

int64_t draw(int64_t n, double u, const Scratch& scratch) {
  double total = 0;
  for (double s : scratch.sums) total += s;
  const double target = u * total;
  int64_t block = 0, last = 0;
  double before = 0;
  for (int64_t b = 0; b < static_cast<int64_t>(scratch.sums.size()); ++b) {
    if (scratch.sums[b] > 0) last = b;
  }
  for (; block < last && before + scratch.sums[block] <= target; ++block) before += scratch.sums[block];
  int64_t found = -1;
  const int64_t end = std::min((block + 1) * kBlock, n);
  for (int64_t i = block * kBlock; i < end; ++i) {
    if (!(scratch.weights[i] > 0)) continue;
    found = i;  // should rounding leave the target just past the block's sum, its last token is drawn
    before += scratch.weights[i];
    if (before > target) break;
  }
  return found;
}

template <typename T>
void sample_row(const SampleRows<T>& rows, int64_t row, Scratch& scratch) {
  const T* x = rows.logits + row * rows.row_stride;
  const int64_t n = rows.vocab;
  const Peak top = peak(x, n);
  rows.tokens[row] = -1;
  rows.kept[row] = top.sound ? 1.0f : NAN;
  if (!top.sound) return;
  if (rows.temperature[row] == 0.0f) {
    int64_t first = 0;
    while (to_float(x[first]) != top.max) ++first;
    rows.tokens[row] = first;
    return;
  }
  const Soften s{rows.softcap, rows.softcap > 0 ? 1.0f / rows.softcap : 0.0f, std::min(1.0f / rows.temperature[row], FLT_MAX)};
  weigh(x, n, s, math::soften<uint32_t, float>(top.max, s.softcap, s.inv_softcap, 1.0f), scratch);
  const int64_t k = rows.top_k[row];
  const float p = rows.top_p[row];
  float threshold = rows.min_p[row];
  double total = 0, left = 0;
  for (double v : scratch.sums) total += v;
  if ((k > 0 && k < n) || p < 1.0f) {
    count(n, scratch);
    Border kept;
    kept.mass = total;
    if (k > 0 && k < n) kept = top_k(n, k, scratch);
    threshold = std::max(threshold, kept.threshold);
    if (p < 1.0f) threshold = std::max(threshold, top_p(n, p, kept, scratch));
  }
  if (threshold > 0.0f) {
    cut(n, threshold, scratch);
    for (double v : scratch.sums) left += v;
    rows.kept[row] = static_cast<float>(left / total);
  }
  rows.tokens[row] = draw(n, rows.uniforms[row], scratch);
}

template <typename T>
void sample_all(const SampleRows<T>& rows) {
#pragma omp parallel
  {
    Scratch scratch;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows.num_rows; ++row) sample_row(rows, row, scratch);
  }
}

}  // namespace

void sample(const SampleRows<float>& rows) { sample_all(rows); }
void sample(const SampleRows<uint16_t>& rows) { sample_all(rows); }

}  // namespace fa::FA_ISA
