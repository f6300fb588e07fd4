// Checks and dispatch of linear_kl's row kernel: by the dtypes of student and teacher.
#include <stdexcept>
#include <string>

#include "cpu/linear_kl.h"
#include "tensor.h"

namespace py = pybind11;

namespace fa {
namespace {

void check_logits(const char* what, const Tensor& logits, const std::vector<int64_t>& shape) {
  if ((logits.dtype != DType::f32 && logits.dtype != DType::bf16) || logits.dim() != 2 || logits.shape != shape)
    throw std::invalid_argument(std::string(what) + ": expected float32 or bfloat16 " + Tensor::describe(logits.dtype, shape) + ", got " +
                                Tensor::describe(logits.dtype, logits.shape));
  if (logits.size(1) > 1 && logits.stride(1) != 1)
    throw std::invalid_argument(std::string(what) + ": expected contiguous rows, got a stride of " + std::to_string(logits.stride(1)));
  if (logits.cuda) throw std::invalid_argument(std::string(what) + ": expected a tensor on the CPU, got one on a GPU");
}

// divergence empty: state is given; g empty: no gradient.
void kl_rows(const Tensor& student, const Tensor& teacher, int kind, double beta, float inv_temperature, const Tensor& divergence,
             const Tensor& state, const Tensor& g) {
  if (student.dim() != 2) throw std::invalid_argument("kl_rows: student: expected [N, V]");
  if (kind < 0 || kind > 2) throw std::invalid_argument("kl_rows: kind: expected 0, 1 or 2, got " + std::to_string(kind));
  check_logits("kl_rows: student", student, student.shape);
  check_logits("kl_rows: teacher", teacher, student.shape);
  const int64_t n = student.size(0);
  if (n == 0) return;
  float* states = state.check("kl_rows: state", DType::f32, {n, kKlState}).contiguous("kl_rows: state").ptr<float>();
  auto floats = [n](const char* what, const Tensor& t) {
    return t.numel() ? t.check(what, DType::f32, {n}).contiguous(what).ptr<float>() : nullptr;
  };
  auto run = [&]<typename S, typename T>(S, T) {
    const KlRows<S, T> rows{student.ptr<S>(),
                            teacher.ptr<T>(),
                            n,
                            student.size(1),
                            student.stride(0),
                            teacher.stride(0),
                            static_cast<math::Divergence>(kind),
                            beta,
                            inv_temperature,
                            floats("kl_rows: divergence", divergence),
                            states,
                            floats("kl_rows: g", g)};
    py::gil_scoped_release release;
    FA_CALL(kl_rows, rows);
  };
  auto with_teacher = [&]<typename S>(S s) { teacher.dtype == DType::f32 ? run(s, float{}) : run(s, uint16_t{}); };
  student.dtype == DType::f32 ? with_teacher(float{}) : with_teacher(uint16_t{});
}

}  // namespace

void bind_linear_kl(py::module_& m) {
  m.def("kl_rows", &kl_rows, py::arg("student"), py::arg("teacher"), py::arg("kind"), py::arg("beta"), py::arg("inv_temperature"),
        py::arg("divergence"), py::arg("state"), py::arg("g"));
}

}  // namespace fa
