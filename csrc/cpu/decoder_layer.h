// What a decoder layer does between its products, norms, rotation and attention, over flat, contiguous numbers; bf16 as uint16_t.
#pragma once
#include <cstdint>

#include "isa.h"

// out = x + part, in the type of x, which `part` is rounded to before; out may be x.
FA_DECLARE(void add(const float* x, const float* part, int64_t size, float* out);
           void add(const uint16_t* x, const float* part, int64_t size, uint16_t* out);
           void add(const uint16_t* x, const uint16_t* part, int64_t size, uint16_t* out);
           void round_to(const float* x, int64_t size, uint16_t* out); void widen(const uint16_t* x, int64_t size, float* out);)
