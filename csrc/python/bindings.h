// SPDX-License-Identifier: Apache-2.0
// The parts of the module zexpert._C, one file each.
#pragma once

#include <pybind11/pybind11.h>

namespace zexpert::python {

void bind_enums(pybind11::module_& module);
void bind_routing_spec(pybind11::module_& module);
void bind_build_info(pybind11::module_& module);
void bind_kernel_plan(pybind11::module_& module);

}  // namespace zexpert::python
