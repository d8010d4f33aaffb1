// The Python module litevae_core. Each operator registers its own functions (csrc/<operator>/bindings.cpp).
#include "common/bindings.h"

#include "build.h"
#include "common/isa.h"

namespace litevae {
namespace {

// The sets that this CPU runs, the best last.
std::vector<std::string> list_isas() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(detect_isa()); ++i) names.push_back(isa_name(static_cast<Isa>(i)));
  return names;
}

void set_isa(const std::string& name) {
  const std::vector<std::string> names = list_isas();
  for (size_t i = 0; i < names.size(); ++i) {
    if (name != names[i]) continue;
    current_isa = static_cast<Isa>(i);
    return;
  }
  throw std::invalid_argument("this CPU does not run '" + name + "' code; the best is " + names.back());
}

}  // namespace

#define LITEVAE_DECLARE(OPERATOR) void bind_##OPERATOR(py::module_& m);
LITEVAE_FOR_EACH_OPERATOR(LITEVAE_DECLARE)
#undef LITEVAE_DECLARE

}  // namespace litevae

PYBIND11_MODULE(litevae_core, m) {
  using namespace litevae;
  m.doc() =
      "The compiled core of litevae_kernels. Its functions take addresses, sizes and strides, not tensors.";
  m.attr("interface") = LITEVAE_INTERFACE;
  m.attr("compiler") = LITEVAE_COMPILER;
  m.attr("openmp") = static_cast<bool>(LITEVAE_OPENMP);
  m.attr("cuda_version") = LITEVAE_CUDA_VERSION;  // empty if the core was built without CUDA
  m.attr("cuda_architectures") = LITEVAE_CUDA_ARCHITECTURES;
  m.attr("cuda_reason") = LITEVAE_CUDA_REASON;  // why the core was built without CUDA
  m.attr("isas") = py::tuple(py::cast(list_isas()));
  m.def("isa", [] { return isa_name(current_isa); });
  m.def("set_isa", &set_isa);

  py::list operators;
#define LITEVAE_BIND(OPERATOR) bind_##OPERATOR(m), operators.append(#OPERATOR);
  LITEVAE_FOR_EACH_OPERATOR(LITEVAE_BIND)
#undef LITEVAE_BIND
  m.attr("operators") = py::tuple(operators);
}
