// attention's CUDA kernels in the twin module, with the module's own checks and plan.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bind_attention_cuda.h"

void bind_attention(pybind11::module_& m) { fa::bind_attention_cuda(m); }
