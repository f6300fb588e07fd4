// The one PYBIND11_MODULE. Each op binds itself in csrc/bind_<op>.cpp's function; every call releases the GIL while it computes.
#include <pybind11/pybind11.h>
#if (defined(__x86_64__) || defined(_M_X64)) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "exchange.h"

namespace py = pybind11;

namespace fa {
void bind_linear_logp(py::module_& m);
void bind_linear_kl(py::module_& m);
void bind_scan(py::module_& m);
void bind_preference(py::module_& m);
void bind_policy(py::module_& m);
void bind_attention(py::module_& m);
void bind_sample(py::module_& m);
void bind_adamw(py::module_& m);
void bind_int8(py::module_& m);
void bind_gemm(py::module_& m);
void bind_rms_norm(py::module_& m);
void bind_rope(py::module_& m);
void bind_swiglu(py::module_& m);
void bind_decoder_layer(py::module_& m);

namespace {

// AMX for bf16: the machine has it, and the kernel saves its state for this process, which has to ask for that once.
bool has_tiles() {
#if (defined(__x86_64__) || defined(_M_X64)) && defined(__linux__)
  constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1u) && (d >> 24 & 1u);
  return there && syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
  return false;
#endif
}

Isa widest() {
#if defined(__x86_64__) || defined(_M_X64)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx2 && avx512) return has_tiles() ? Isa::amx : Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::baseline;
}

const Isa kWidest = widest();
Isa chosen = kWidest;
constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "amx"};

py::tuple isas() {
  py::tuple names(static_cast<int>(kWidest) + 1);
  for (size_t i = 0; i < names.size(); ++i) names[i] = kNames[i];
  return names;
}

void set_isa(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(kWidest); ++i)
    if (name == kNames[i]) {
      chosen = static_cast<Isa>(i);
      return;
    }
  throw std::invalid_argument("set_isa: expected an instruction set up to '" + std::string(kNames[static_cast<int>(kWidest)]) +
                              "' (baseline, avx2, avx512, amx), got '" + name + "'");
}

}  // namespace

Isa isa() { return chosen; }

bool has_bf16_dot() {
#if defined(__x86_64__) || defined(_M_X64)
  return isa() >= Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

}  // namespace fa

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastalign's native kernels; torch-free. Import torch first: OpenMP comes from the runtime that torch has loaded.";
  m.def("isa", [] { return std::string(fa::kNames[static_cast<int>(fa::isa())]); }, "The CPU instruction set in use.");
  m.def("isas", &fa::isas, "The instruction sets that this machine has, the widest last.");
  m.def("set_isa", &fa::set_isa, py::arg("name"), "Use a narrower instruction set than the machine has (tests).");
  m.def("read_by_table", &fa::exchange::use, py::arg("types"), py::arg("capsule"),
        "Read tensors of these types by torch's table of C functions; None: by their attributes. Whether the table is of a known layout.");
  py::list ops, cuda_ops;  // what this build has, by the stem of the source
#ifdef HAS_linear_logp
  fa::bind_linear_logp(m);
  ops.append("linear_logp");
#endif
#ifdef HAS_linear_kl
  fa::bind_linear_kl(m);
  ops.append("linear_kl");
#endif
#ifdef HAS_scan
  fa::bind_scan(m);
  ops.append("scan");
#endif
#ifdef HAS_preference
  fa::bind_preference(m);
  ops.append("preference");
#endif
#ifdef HAS_policy
  fa::bind_policy(m);
  ops.append("policy");
#endif
#ifdef HAS_attention
  fa::bind_attention(m);
  ops.append("attention");
#endif
#ifdef HAS_sample
  fa::bind_sample(m);
  ops.append("sample");
#endif
#ifdef HAS_adamw
  fa::bind_adamw(m);
  ops.append("adamw");
#endif
#ifdef HAS_int8
  fa::bind_int8(m);
  ops.append("int8");
#endif
#ifdef HAS_gemm
  fa::bind_gemm(m);
  ops.append("gemm");
#endif
#ifdef HAS_rms_norm
  fa::bind_rms_norm(m);
  ops.append("rms_norm");
#endif
#ifdef HAS_rope
  fa::bind_rope(m);
  ops.append("rope");
#endif
#ifdef HAS_swiglu
  fa::bind_swiglu(m);
  ops.append("swiglu");
#endif
#ifdef HAS_decoder_layer
  fa::bind_decoder_layer(m);  // no op of its own: others' in a row
#endif
#ifdef HAS_CUDA_linear_logp
  cuda_ops.append("linear_logp");
#endif
#ifdef HAS_CUDA_linear_kl
  cuda_ops.append("linear_kl");
#endif
#ifdef HAS_CUDA_scan
  cuda_ops.append("scan");
#endif
#ifdef HAS_CUDA_preference
  cuda_ops.append("preference");
#endif
#ifdef HAS_CUDA_policy
  cuda_ops.append("policy");
#endif
#ifdef HAS_CUDA_attention
  cuda_ops.append("attention");
#endif
#ifdef HAS_CUDA_sample
  cuda_ops.append("sample");
#endif
#ifdef HAS_CUDA_adamw
  cuda_ops.append("adamw");
#endif
#ifdef HAS_CUDA
  m.attr("cuda_architectures") = FA_CUDA_ARCHITECTURES;
#else
  m.attr("cuda_architectures") = "";
#endif
  m.attr("ops") = py::tuple(ops);
  m.attr("cuda_ops") = py::tuple(cuda_ops);
}
