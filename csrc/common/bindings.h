// Helpers for the bindings of all operators. Only files named bindings.cpp include this header, and with it
// pybind11.
//
// A tensor arrives as a TensorView: address, dtype code, sizes and strides. The Python side has validated the
// tensors and allocated the outputs; bindings only check what keeps a kernel inside the tensors' memory.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensor_view.h"

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
