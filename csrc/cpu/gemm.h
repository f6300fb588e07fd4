// Matrix products of fp32 or bf16 operands with fp32 sums, for CPUs on which torch's are slow: AVX2 without AVX-512 (bf16 above
// all), and for those with AMX, where a row's bits of torch's depend on the other rows.
#pragma once
#include <cstdint>

#include "isa.h"

namespace fa {

// c (+)= alpha * (a * b + bias). a [m, k] and b [k, n] have any strides (in elements) and one type; c has contiguous rows.
struct Gemm {
  const void *a, *b;  // fp32, or bf16
  bool bf16;
  int64_t a_row, a_column, b_row, b_column;
  const void* packed;  // b as `gemm_pack` lays it out, in the type of a, or null; then b is not read
  const float* bias;   // [n] or null
  float* c;
  int64_t c_row, m, n, k;
  float alpha;
  bool add;          // to what is in c
  uint16_t* narrow;  // bf16 results instead of c's, or null; by tiles alone, and nothing is added
  bool tiles;        // on AMX, bf16 operands alone
};

constexpr int64_t kTilesDepth = 8192;  // the deepest product that tiles round themselves; a deeper one's fp32 sums leave them on the way

}  // namespace fa

FA_DECLARE(void gemm(const Gemm& product);
           // b → [ceil(n / gemm_panel())][k][gemm_panel()], zeros beside
           void gemm_pack(const Gemm& product, void* packed); int64_t gemm_panel();
           // total += alpha * part (bf16), `size` numbers of each
           void add_widened(float* total, const uint16_t* part, int64_t size, float alpha);)

#if defined(__x86_64__) || defined(_M_X64)
// The same on AMX; b is packed as [ceil(n / tile_side())][ceil(k / tile_step()) * tile_step()][tile_side()].
namespace fa::avx512 {
void gemm_by_tiles(const Gemm& product);
void gemm_pack_by_tiles(const Gemm& product, void* packed);
int64_t tile_side();
int64_t tile_step();
}  // namespace fa::avx512
#endif
