// Philox4x32-10 (Salmon et al., SC 2011): counter-based random numbers. The same (key, counter) gives the same four words on every
// device, in any order, under any batching: a draw depends on what it is for, not on when it is made.
#pragma once
#include <cstdint>

#include "exp.h"

namespace fa::math {

struct Philox {
  uint32_t word[4];
};

FA_MATH uint32_t high_product(uint32_t a, uint32_t b) { return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32); }

// counter: 128 bits as (low, high); key: 64 bits.
FA_MATH Philox philox(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter_low), c1 = static_cast<uint32_t>(counter_low >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_high), c3 = static_cast<uint32_t>(counter_high >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = high_product(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
    const uint32_t high1 = high_product(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Uniform in [0, 1) with 53 bits, and in (0, 1) with 24.
FA_MATH double uniform53(uint32_t high, uint32_t low) {
  const uint64_t bits = ((static_cast<uint64_t>(high) << 32) | low) >> 11;
  return static_cast<double>(bits) * (1.0 / 9007199254740992.0);
}
FA_MATH float uniform24(uint32_t word) { return (static_cast<float>(word >> 8) + 0.5f) * (1.0f / 16777216.0f); }

}  // namespace fa::math
