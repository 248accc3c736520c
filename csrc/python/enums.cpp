// SPDX-License-Identifier: Apache-2.0
#include "zexpert/enums.h"

#include <pybind11/native_enum.h>

#include <string_view>

#include "bindings.h"

namespace py = pybind11;

namespace zexpert::python {
namespace {

#define ZEXPERT_PYTHON_VALUE(enumerator, python_name, text) .value(#python_name, Enum::enumerator)

#define ZEXPERT_BIND_ENUM(Name, LIST, doc)                                                        \
  {                                                                                               \
    using Enum = Name;                                                                            \
    py::native_enum<Enum>(module, #Name, "enum.Enum", doc) LIST(ZEXPERT_PYTHON_VALUE).finalize(); \
    module.def("name", [](Enum value) { return name(value); }, py::arg("value"));                 \
  }

}  // namespace

void bind_enums(py::module_& module) {
  ZEXPERT_BIND_ENUM(ScoringFunc, ZEXPERT_SCORING_FUNCS,
                    "How a logit becomes a score: softmax over all experts, sigmoid, or sqrt(softplus).")
  ZEXPERT_BIND_ENUM(ZeroExpertType, ZEXPERT_ZERO_EXPERT_TYPES,
                    "What a zero expert does with a token: returns it, adds a learned constant, or nothing.")

  module.def("parse_scoring_func", &parse_scoring_func, py::arg("value"));
  module.def("parse_zero_expert_type", &parse_zero_expert_type, py::arg("value"));
}

}  // namespace zexpert::python
