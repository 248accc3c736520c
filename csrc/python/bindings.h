// SPDX-License-Identifier: Apache-2.0
// The parts of the module zexpert._C, one file each.
#pragma once

#include <pybind11/pybind11.h>

namespace zexpert::python {

void bind_enums(pybind11::module_& module);
void bind_routing_spec(pybind11::module_& module);
void bind_build_info(pybind11::module_& module);
void bind_kernel_plan(pybind11::module_& module);

/// Makes `cls.__new__` return complete objects, as those of Python's immutable types do: it calls __init__ itself, and
/// pybind11 ignores the second call. Without this, cls.__new__(cls) would have uninitialised memory for attributes. To
/// be called when __init__ is bound.
inline void construct_in_new(pybind11::object cls) {
  namespace py = pybind11;
  const py::object allocate = cls.attr("__new__");
  const py::object init = cls.attr("__init__");
  cls.attr("__new__") =
      py::module_::import("builtins")
          .attr("staticmethod")(py::cpp_function(
              [allocate, init](const py::object& type, const py::args& arguments, const py::kwargs& keywords) {
                py::object self = allocate(type);
                init(self, *arguments, **keywords);
                return self;
              },
              py::name("__new__")));
}

}  // namespace zexpert::python
