// Helpers for the bindings of all operators. Only files named bindings.cpp include this header, and with it
// pybind11.
//
// A tensor arrives as a tuple (address, dtype code, sizes, strides) and becomes a TensorView; a class in
// between would take longer than a small kernel. The Python side has validated the tensors and allocated the
// outputs; bindings only check what keeps a kernel inside the tensors' memory.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "tensor_view.h"

namespace pybind11::detail {

template <>
struct type_caster<litevae::TensorView> {
  PYBIND11_TYPE_CASTER(litevae::TensorView, const_name("tuple[int, int, tuple[int, ...], tuple[int, ...]]"));

  bool load(handle tensor, bool) {
    if (!PyTuple_Check(tensor.ptr()) || PyTuple_GET_SIZE(tensor.ptr()) != 4) return false;
    const handle size = PyTuple_GET_ITEM(tensor.ptr(), 2), stride = PyTuple_GET_ITEM(tensor.ptr(), 3);
    if (!PyTuple_Check(size.ptr()) || !PyTuple_Check(stride.ptr())) return false;
    const int64_t dtype = integer(tensor, 1);
    if (dtype < 0 || dtype > 3) throw std::invalid_argument("unknown dtype code " + std::to_string(dtype));
    value = {
        reinterpret_cast<void*>(integer(tensor, 0)), static_cast<litevae::DType>(dtype), {1, 1, 1, 1}, {}};
    const auto dimensions = PyTuple_GET_SIZE(size.ptr());
    if ((dimensions != 4 && dimensions != 1) || PyTuple_GET_SIZE(stride.ptr()) != dimensions)
      throw std::invalid_argument("a tensor must have 4 dimensions, or 1");
    for (int i = 0; i < dimensions; ++i) {
      const int axis = dimensions == 1 ? 1 : i;  // (C) stands for (1, C, 1, 1)
      value.size[axis] = integer(size, i), value.stride[axis] = integer(stride, i);
    }
    return true;
  }

 private:
  static int64_t integer(handle tuple, int i) {
    const int64_t number = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
    if (number == -1 && PyErr_Occurred()) throw error_already_set();
    return number;
  }
};

}  // namespace pybind11::detail

namespace litevae {
namespace py = pybind11;

using OptionalView = std::optional<TensorView>;
// Kernels on the CPU run without the interpreter's lock.
using WithoutGil = py::call_guard<py::gil_scoped_release>;

inline void check_fits(bool fits, const char* name) {
  if (!fits) throw std::invalid_argument(std::string(name) + " does not fit the other tensors");
}

inline bool same_size(const TensorView& a, const TensorView& b) {
  return std::equal(a.size, a.size + 4, b.size);
}

// Whether `t` has the size of `like`, but with `channels` channels.
inline bool same_size(const TensorView& t, const TensorView& like, int64_t channels) {
  return t.size[0] == like.size[0] && t.size[1] == channels && t.size[2] == like.size[2] &&
         t.size[3] == like.size[3];
}

template <class T = void>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace litevae
