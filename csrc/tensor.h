// The view of a tensor that crosses the binding: pointer, shape, strides (in elements), dtype, device.
// The module is not linked to torch: what `exchange` knows is read by its table, and anything with data_ptr(), shape, stride(), dtype and is_cuda.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "exchange.h"

namespace fa {

enum class DType { f32, f64, bf16, f16, i16, i32, i64, u8, boolean };

inline const char* name(DType t) {
  switch (t) {
    case DType::f32: return "float32";
    case DType::f64: return "float64";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::i16: return "int16";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
    case DType::u8: return "uint8";
    case DType::boolean: return "bool";
  }
  return "?";
}

struct Tensor {
  void* data = nullptr;
  std::vector<int64_t> shape, strides;
  DType dtype = DType::f32;
  bool cuda = false;

  int64_t dim() const { return static_cast<int64_t>(shape.size()); }
  int64_t size(int64_t i) const { return shape[i]; }
  int64_t stride(int64_t i) const { return strides[i]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int64_t s : shape) n *= s;
    return n;
  }
  template <typename T>
  T* ptr() const {
    return static_cast<T*>(data);
  }

  // Throws "what: expected float32 [.., 3], got bfloat16 [2, 4]"; -1 in `want` stands for any size.
  const Tensor& check(const char* what, DType type, std::vector<int64_t> want) const {
    bool ok = dtype == type && shape.size() == want.size();
    for (size_t i = 0; ok && i < want.size(); ++i) ok = want[i] < 0 || want[i] == shape[i];
    if (!ok) throw std::invalid_argument(std::string(what) + ": expected " + describe(type, want) + ", got " + describe(dtype, shape));
    return *this;
  }
  const Tensor& contiguous(const char* what) const {
    if (numel() == 0) return *this;  // whatever its strides
    int64_t expect = 1;
    for (size_t i = shape.size(); i-- > 0;) {
      if (shape[i] != 1 && strides[i] != expect)
        throw std::invalid_argument(std::string(what) + ": expected a contiguous tensor, got " + describe(dtype, shape) + " with gaps");
      expect *= shape[i];
    }
    return *this;
  }
  static std::string describe(DType type, const std::vector<int64_t>& shape) {
    std::string s = std::string(name(type)) + " [";
    for (size_t i = 0; i < shape.size(); ++i) s += (i ? ", " : "") + (shape[i] < 0 ? std::string("*") : std::to_string(shape[i]));
    return s + "]";
  }
};

}  // namespace fa

namespace pybind11::detail {

template <>
struct type_caster<fa::Tensor> {
  PYBIND11_TYPE_CASTER(fa::Tensor, const_name("torch.Tensor"));

  // A tensor by the table takes 0.2 us, by its attributes 1.1 (AMD EPYC). Attribute names are interned once.
  bool load(handle src, bool) {
    if (fa::exchange::reads(src.ptr())) {
      fa::exchange::View view;
      if (fa::exchange::table->view(src.ptr(), &view) == 0) {
        if (taken(view)) return true;
      } else {  // what it is, its attributes tell
        PyErr_Clear();
      }
    }
    static PyObject* const names[] = {PyUnicode_InternFromString("data_ptr"), PyUnicode_InternFromString("shape"),
                                      PyUnicode_InternFromString("stride"), PyUnicode_InternFromString("dtype"),
                                      PyUnicode_InternFromString("is_cuda")};
    object data = reinterpret_steal<object>(PyObject_CallMethodNoArgs(src.ptr(), names[0]));
    if (!data) {
      PyErr_Clear();
      return false;
    }
    value.data = PyLong_AsVoidPtr(data.ptr());
    value.shape = sizes(reinterpret_steal<object>(PyObject_GetAttr(src.ptr(), names[1])));
    value.strides = sizes(reinterpret_steal<object>(PyObject_CallMethodNoArgs(src.ptr(), names[2])));
    object dtype = reinterpret_steal<object>(PyObject_GetAttr(src.ptr(), names[3]));
    object cuda = reinterpret_steal<object>(PyObject_GetAttr(src.ptr(), names[4]));
    if (!dtype || !cuda) throw error_already_set();
    value.dtype = dtype_of(dtype);
    value.cuda = cuda.ptr() == Py_True;
    if (!value.data && value.numel()) throw type_error("fastalign: a native kernel was given a tensor without memory (meta or fake)");
    return true;
  }

 private:
  // False: a dtype or device that the attributes name in an error.
  bool taken(const fa::exchange::View& view) {
    using namespace fa::exchange;
    const bool cuda = view.device_type == kCuda;
    if ((!cuda && view.device_type != kCpu && view.device_type != kPinned) || view.lanes != 1) return false;
    switch (view.code << 8 | view.bits) {
      case kFloat << 8 | 32: value.dtype = fa::DType::f32; break;
      case kFloat << 8 | 64: value.dtype = fa::DType::f64; break;
      case kBfloat << 8 | 16: value.dtype = fa::DType::bf16; break;
      case kFloat << 8 | 16: value.dtype = fa::DType::f16; break;
      case kSigned << 8 | 16: value.dtype = fa::DType::i16; break;
      case kSigned << 8 | 32: value.dtype = fa::DType::i32; break;
      case kSigned << 8 | 64: value.dtype = fa::DType::i64; break;
      case kUnsigned << 8 | 8: value.dtype = fa::DType::u8; break;
      case kBool << 8 | 8: value.dtype = fa::DType::boolean; break;
      default: return false;
    }
    value.cuda = cuda;
    value.data = static_cast<char*>(view.data) + view.byte_offset;
    value.shape.assign(view.shape, view.shape + view.ndim);
    value.strides.assign(view.strides, view.strides + view.ndim);
    return value.data || !value.numel();
  }

  static std::vector<int64_t> sizes(const object& tuple) {
    if (!tuple) throw error_already_set();
    const Py_ssize_t n = PyTuple_Size(tuple.ptr());
    std::vector<int64_t> out(static_cast<size_t>(n < 0 ? 0 : n));
    for (size_t i = 0; i < out.size(); ++i) out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), static_cast<Py_ssize_t>(i)));
    if (PyErr_Occurred()) throw error_already_set();
    return out;
  }

  static fa::DType dtype_of(handle dtype) {  // torch.dtype objects are singletons: remember them by address
    static std::vector<std::pair<PyObject*, fa::DType>> known;
    for (auto& [object, type] : known)
      if (object == dtype.ptr()) return type;
    std::string text = str(dtype);
    for (auto type : {fa::DType::f32, fa::DType::f64, fa::DType::bf16, fa::DType::f16, fa::DType::i16, fa::DType::i32, fa::DType::i64,
                      fa::DType::u8, fa::DType::boolean})
      if (text == std::string("torch.") + fa::name(type)) {
        known.emplace_back(dtype.ptr(), type);
        return type;
      }
    throw type_error("fastalign: no native kernel reads dtype " + text);
  }
};

}  // namespace pybind11::detail
