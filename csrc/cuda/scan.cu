// GAE and discounted returns over packed sequences on the GPU: one flat backward scan over all T tokens, whatever the sequences.
//   Formula: csrc/math/gae.h. A token is an affine map of what comes after it, a hole the identity, the last token of a sequence a
//            constant; maps compose associatively, so one sequence of 131,072 tokens is as parallel as many short ones.
//   Layout:  a thread has 4 consecutive tokens (one 16-byte load an fp32 array), a CTA of 256 threads a tile of 1024, grid ceil(T / 1024).
//   Passes:  spans_kernel composes each tile to one Span (skipped when there is one tile). scan_kernel composes the spans of the tiles
//            after its own, 256 at a time, nearest first, until one is closed (holds the end of a sequence; the very next one, where
//            sequences are short), then scans its tile and writes. No atomics, no waiting between CTAs: the order of every sum is fixed.
//   Bytes:   rewards, values (and mask) read twice, the second time mostly from L2; advantages and returns written once; 48 a tile.
//   Numerics: fp64 for every sum. The tree of a sum depends on where in the pack a sequence stands: fp64 rounding, about 1e-16.
#include "scan.h"

#include "../math/gae.h"
#include "block.h"
#include "pack.h"

namespace fa::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kItems = 4;  // tokens a thread
constexpr int kTile = kThreads * kItems;

using Span = math::Span<double>;

int64_t num_tiles(int64_t num_tokens) { return (num_tokens + kTile - 1) / kTile; }

template <typename T>
struct Scan {
  GaeScan<T> gae;  // discounted returns: values and returns null, lam 1
  int64_t num_tokens;
  bool aligned;  // every [T] array starts on a 16-byte boundary, the mask on one of 4
};

// What a thread knows of its tokens.
template <typename T>
struct Tokens {
  T reward[kItems], value[kItems];
  double scale[kItems], shift[kItems], bootstrap[kItems];
  bool present[kItems], valid[kItems], last[kItems];  // last: of its sequence
};

template <typename T>
__device__ __forceinline__ void load(T (&to)[kItems], const T* from, int64_t begin, int64_t n, bool aligned) {
  if (aligned && begin + kItems <= n) {
#pragma unroll
    for (int part = 0; part < kItems; part += Pack<T>::kSize) {
      const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(from + begin + part);
#pragma unroll
      for (int i = 0; i < Pack<T>::kSize; ++i) to[part + i] = pack.lane[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) to[i] = begin + i < n ? from[begin + i] : T(0);
  }
}

template <typename T>
__device__ __forceinline__ void store(T* to, const T (&from)[kItems], int64_t begin, int64_t n, bool aligned) {
  if (aligned && begin + kItems <= n) {
#pragma unroll
    for (int part = 0; part < kItems; part += Pack<T>::kSize) {
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < Pack<T>::kSize; ++i) pack.lane[i] = from[part + i];
      *reinterpret_cast<Pack<T>*>(to + begin + part) = pack;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (begin + i < n) to[begin + i] = from[i];
  }
}

__device__ __forceinline__ void load_mask(bool (&to)[kItems], const bool* mask, int64_t begin, int64_t n, bool aligned) {
  if (aligned && begin + kItems <= n) {
    const uint32_t four = *reinterpret_cast<const uint32_t*>(mask + begin);
#pragma unroll
    for (int i = 0; i < kItems; ++i) to[i] = (four >> 8 * i & 0xffu) != 0;
  } else {
#pragma unroll
    for (int i = 0; i < kItems; ++i) to[i] = begin + i < n && mask[begin + i];
  }
}

struct Sequence {
  int64_t index, begin, end;
};

// The first sequence that ends behind token t; past the last one when there is none.
__device__ __forceinline__ Sequence owner_of(int64_t t, const int32_t* cu_seqlens, int64_t num_sequences) {
  int64_t low = 0, high = num_sequences;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    cu_seqlens[middle + 1] > t ? high = middle : low = middle + 1;
  }
  if (low == num_sequences) return {low, t + 1, t};  // holds nothing
  return {low, cu_seqlens[low], cu_seqlens[low + 1]};
}

template <typename T, bool kHoles>
__device__ __forceinline__ Tokens<T> tokens_of(const Scan<T>& scan, int64_t begin) {
  const GaeScan<T>& gae = scan.gae;
  Tokens<T> tokens{};
  load(tokens.reward, gae.rewards, begin, scan.num_tokens, scan.aligned);
  if (gae.values) load(tokens.value, gae.values, begin, scan.num_tokens, scan.aligned);
  if constexpr (kHoles) load_mask(tokens.valid, gae.mask, begin, scan.num_tokens, scan.aligned);
  Sequence sequence{-1, begin + kItems, 0};
  double lam = gae.lam, bootstrap = 0.0;
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    const int64_t t = begin + i;
    tokens.present[i] = t < scan.num_tokens;
    if (!tokens.present[i]) continue;
    if (t < sequence.begin) {
      const int64_t before = sequence.index - 1;  // its neighbour, unless that one is empty
      const bool near = before >= 0 && gae.cu_seqlens[before] <= t && t < gae.cu_seqlens[before + 1];
      sequence = near ? Sequence{before, gae.cu_seqlens[before], gae.cu_seqlens[before + 1]}
                      : owner_of(t, gae.cu_seqlens, gae.num_sequences);
      const bool held = sequence.begin <= t && t < sequence.end;
      if (held && gae.lams) lam = gae.lams[sequence.index];
      bootstrap = !held ? NAN : gae.bootstrap ? static_cast<double>(gae.bootstrap[sequence.index]) : 0.0;
    }
    const bool held = sequence.begin <= t && t < sequence.end;
    const double value = tokens.value[i], surplus = tokens.reward[i] - value;
    const math::Affine<double> map = math::gae_map(surplus, value, gae.gamma, lam);
    tokens.valid[i] = !kHoles || tokens.valid[i] || !held;
    tokens.last[i] = !held || t + 1 == sequence.end;
    tokens.scale[i] = map.scale;
    tokens.shift[i] = held ? map.shift : NAN;
    tokens.bootstrap[i] = bootstrap;
  }
  return tokens;
}

template <typename T>
__device__ __forceinline__ double surplus_of(const Tokens<T>& tokens, int i) {
  return static_cast<double>(tokens.reward[i]) - static_cast<double>(tokens.value[i]);
}

template <typename T>
__device__ __forceinline__ Span span_of(const Tokens<T>& tokens, double gamma) {
  Span span = math::open_span<double>();
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    if (!tokens.present[i]) continue;
    if (tokens.last[i]) span = math::sequence_end(tokens.bootstrap[i]);
    if (tokens.valid[i]) span = math::with_token({tokens.scale[i], tokens.shift[i]}, surplus_of(tokens, i), gamma, span);
  }
  return span;
}

// Without holes the advantage needs only x: its half of the span stays behind.
template <bool kHoles>
__device__ __forceinline__ Span shuffle_down(const Span& span, int distance) {
  constexpr unsigned kAll = 0xffffffffu;
  Span other = math::open_span<double>();
  other.x.scale = __shfl_down_sync(kAll, span.x.scale, distance);
  other.x.shift = __shfl_down_sync(kAll, span.x.shift, distance);
  if constexpr (kHoles) {
    other.advantage.scale = __shfl_down_sync(kAll, span.advantage.scale, distance);
    other.advantage.shift = __shfl_down_sync(kAll, span.advantage.shift, distance);
  }
  const int flags = __shfl_down_sync(kAll, (span.seen ? 1 : 0) + (span.closed ? 2 : 0), distance);
  other.seen = flags & 1;
  other.closed = flags & 2;
  return other;
}

// The span of the CTA's threads after this one; `total`: of all of them.
template <bool kHoles>
__device__ __forceinline__ Span after_thread(const Span& own, Span& total) {
  __shared__ Span warps[kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Span span = own;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Span other = shuffle_down<kHoles>(span, distance);
    if (lane + distance < 32) span = math::join(span, other);
  }
  Span next = shuffle_down<kHoles>(span, 1);
  if (lane == 31) next = math::open_span<double>();
  if (lane == 0) warps[warp] = span;
  __syncthreads();
  Span later = math::open_span<double>();
  total = later;
  for (int w = kWarps - 1; w >= 0; --w) {
    if (w == warp) later = total;
    total = math::join(warps[w], total);
  }
  __syncthreads();  // the next call writes warps again
  return math::join(next, later);
}

template <typename T, bool kHoles>
__global__ void __launch_bounds__(kThreads) spans_kernel(Scan<T> scan, Span* tiles) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile + static_cast<int64_t>(threadIdx.x) * kItems;
  const Tokens<T> tokens = tokens_of<T, kHoles>(scan, begin);
  Span total;
  after_thread<kHoles>(span_of(tokens, scan.gae.gamma), total);
  if (threadIdx.x == 0) tiles[blockIdx.x] = total;
}

// What the tiles after this one hand to it.
template <bool kHoles>
__device__ __forceinline__ Span after_tile(const Span* tiles, int64_t tile, int64_t count) {
  if (tile + 1 >= count) return math::open_span<double>();
  Span after = tiles[tile + 1];
  for (int64_t next = tile + 2; !after.closed && next < count; next += kThreads) {
    const int64_t mine = next + threadIdx.x;
    Span total;
    after_thread<kHoles>(mine < count ? tiles[mine] : math::open_span<double>(), total);
    after = math::join(after, total);
  }
  return after;
}

template <typename T, bool kHoles>
__global__ void __launch_bounds__(kThreads) scan_kernel(Scan<T> scan, const Span* tiles) {
  const GaeScan<T>& gae = scan.gae;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTile + static_cast<int64_t>(threadIdx.x) * kItems;
  const Tokens<T> tokens = tokens_of<T, kHoles>(scan, begin);
  Span total;
  const Span inside = after_thread<kHoles>(span_of(tokens, gae.gamma), total);
  const Span after = math::join(inside, after_tile<kHoles>(tiles, blockIdx.x, gridDim.x));
  double x = after.x.shift, advantage = after.advantage.shift;  // behind everything x and advantage are 0
  T advantages[kItems], returns[kItems];
#pragma unroll
  for (int i = kItems - 1; i >= 0; --i) {
    if (tokens.last[i]) x = tokens.bootstrap[i], advantage = 0.0;
    if (tokens.valid[i]) {
      advantage = math::gae_advantage(surplus_of(tokens, i), gae.gamma, x);
      x = math::apply(math::Affine<double>{tokens.scale[i], tokens.shift[i]}, x);
    }
    advantages[i] = static_cast<T>(advantage);
    returns[i] = static_cast<T>(advantage + static_cast<double>(tokens.value[i]));
  }
  if (begin >= scan.num_tokens) return;
  store(gae.advantages, advantages, begin, scan.num_tokens, scan.aligned);
  if (gae.returns) store(gae.returns, returns, begin, scan.num_tokens, scan.aligned);
}

bool starts_on(const void* pointer, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <typename T>
void launch_scan(const char* what, const GaeScan<T>& gae, int64_t num_tokens, double* workspace, uintptr_t stream) {
  if (num_tokens == 0) return;
  const bool aligned = starts_on(gae.mask, 4) && starts_on(gae.rewards, 16) && starts_on(gae.values, 16) &&
                       starts_on(gae.advantages, 16) && starts_on(gae.returns, 16);
  const Scan<T> scan{gae, num_tokens, aligned};
  Span* tiles = reinterpret_cast<Span*>(workspace);
  const dim3 grid(static_cast<unsigned>(num_tiles(num_tokens)));
  auto* spans = gae.mask ? &spans_kernel<T, true> : &spans_kernel<T, false>;
  auto* write = gae.mask ? &scan_kernel<T, true> : &scan_kernel<T, false>;
  if (grid.x > 1) launch(what, spans, grid, kThreads, stream, scan, tiles);
  launch(what, write, grid, kThreads, stream, scan, static_cast<const Span*>(tiles));
}

}  // namespace

int64_t scan_workspace(int64_t num_tokens) { return num_tiles(num_tokens) * static_cast<int64_t>(sizeof(Span) / sizeof(double)); }

void gae(const GaeScan<float>& scan, int64_t num_tokens, double* workspace, uintptr_t stream) {
  launch_scan("gae", scan, num_tokens, workspace, stream);
}
void gae(const GaeScan<double>& scan, int64_t num_tokens, double* workspace, uintptr_t stream) {
  launch_scan("gae", scan, num_tokens, workspace, stream);
}
void discounted_returns(const DiscountedScan<float>& scan, int64_t num_tokens, double* workspace, uintptr_t stream) {
  launch_scan("discounted_returns", as_gae(scan), num_tokens, workspace, stream);
}
void discounted_returns(const DiscountedScan<double>& scan, int64_t num_tokens, double* workspace, uintptr_t stream) {
  launch_scan("discounted_returns", as_gae(scan), num_tokens, workspace, stream);
}

}  // namespace fa::cuda
