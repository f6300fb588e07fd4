// A tensor's view by the table of C functions that torch offers for it (DLPack 1.x, `__dlpack_c_exchange_api__`), without asking the object for
// attributes. Only the layout of that interface is declared here; nothing is linked.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace fa::exchange {

enum Code : uint8_t { kSigned = 0, kUnsigned = 1, kFloat = 2, kBfloat = 4, kBool = 6 };
enum Device : int32_t { kCpu = 1, kCuda = 2, kPinned = 3 };

struct View {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct Table {
  uint32_t major, minor;
  const Table* older;
  void *allocate, *export_owning, *import_owning;
  int (*view)(void* tensor, View* out);  // 0, or -1 with a Python error set; shape and strides live as long as the tensor
  void* stream;
};

// The types whose objects `table` reads, set once as the package loads; empty: attributes are asked for.
inline const Table* table = nullptr;
inline std::vector<PyTypeObject*> types;

inline bool reads(PyObject* object) { return std::find(types.begin(), types.end(), Py_TYPE(object)) != types.end(); }

// These very types, not what is derived from them: a subclass may answer for itself. False: no table of a layout that is known here.
inline bool use(const pybind11::tuple& of, const pybind11::object& capsule) {
  types.clear();
  table = nullptr;
  if (PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api"))
    table = static_cast<const Table*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (table && table->major != 1) table = table->older;
  if (!table || !table->view) return false;
  for (pybind11::handle type : of) {
    type.inc_ref();
    types.push_back(reinterpret_cast<PyTypeObject*>(type.ptr()));
  }
  return true;
}

}  // namespace fa::exchange
