// One source, several instruction sets. Each csrc/cpu/<op>.cpp is compiled once an ISA with FA_ISA naming its namespace:
//   header:  FA_DECLARE(void logp_rows(const LogpRows& rows);)       declares it in every ISA's namespace
//   source:  namespace fa::FA_ISA { void logp_rows(...) {...} }
//   binding: FA_CALL(logp_rows, rows)                                the widest set this machine has
#pragma once

namespace fa {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2, amx = 3 };  // amx: the AVX-512 sources, and tiles for bf16 products

Isa isa();  // in use: the widest that the machine has, unless a test has chosen a narrower one
bool has_bf16_dot();  // vdpbf16ps

}  // namespace fa

#if defined(FA_CUDA_ALONE)  // the bindings beside a host twin of the CUDA kernels (tests/conftest.py): no CPU kernel is linked
#include <stdexcept>
#include <string>
namespace fa {
template <typename Result>
[[noreturn]] Result not_linked(const char* function) {
  throw std::logic_error(std::string(function) + ": this build has the CUDA kernels alone");
}
}  // namespace fa
#define FA_DECLARE(...) \
  namespace fa::baseline { __VA_ARGS__ }
#define FA_CALL(fn, ...) (::fa::not_linked<decltype(::fa::baseline::fn(__VA_ARGS__))>(#fn))
#elif defined(__x86_64__) || defined(_M_X64)
#define FA_DECLARE(...)                \
  namespace fa::baseline { __VA_ARGS__ } \
  namespace fa::avx2 { __VA_ARGS__ }     \
  namespace fa::avx512 { __VA_ARGS__ }
#define FA_CALL(fn, ...)                                              \
  (::fa::isa() >= ::fa::Isa::avx512 ? ::fa::avx512::fn(__VA_ARGS__)   \
   : ::fa::isa() == ::fa::Isa::avx2 ? ::fa::avx2::fn(__VA_ARGS__) \
                                    : ::fa::baseline::fn(__VA_ARGS__))
#else
#define FA_DECLARE(...) \
  namespace fa::baseline { __VA_ARGS__ }
#define FA_CALL(fn, ...) (::fa::baseline::fn(__VA_ARGS__))
#endif
