// The CUDA kernels as a host module (see tests/conftest.py): every csrc/cuda/<op>.cu, bound by tests/cuda_twin/<op>.cpp.
#include <pybind11/pybind11.h>

#define FA_OP(op) void bind_##op(pybind11::module_& m);
#include "ops.inc"
#undef FA_OP

PYBIND11_MODULE(cuda_twin, m) {
#define FA_OP(op) bind_##op(m);
#include "ops.inc"
#undef FA_OP
}
