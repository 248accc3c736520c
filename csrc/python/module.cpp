// SPDX-License-Identifier: Apache-2.0
// zexpert._C holds only non-tensor code. Functions of tensors are operators, torch.ops.zexpert, which TorchScript,
// torch.compile and C++ programs without Python can call too.
#include <exception>

#include "bindings.h"
#include "zexpert/error.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Enumerations, RoutingSpec, build information and kernel plans, shared with zexpert's C++ code.";
  pybind11::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) {
        std::rethrow_exception(pointer);
      }
    } catch (const zexpert::Error& error) {
      pybind11::set_error(PyExc_ValueError, error.what());
    }
  });
  zexpert::python::bind_enums(module);
  zexpert::python::bind_routing_spec(module);
  zexpert::python::bind_build_info(module);
  zexpert::python::bind_kernel_plan(module);
}
