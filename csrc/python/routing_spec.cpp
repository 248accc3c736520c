// SPDX-License-Identifier: Apache-2.0
#include "zexpert/routing_spec.h"

#include <pybind11/native_enum.h>
#include <pybind11/operators.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>
#include <variant>

#include "bindings.h"

namespace py = pybind11;

namespace zexpert::python {
namespace {

/// The argument as a T. Throws an Error that says what it must be; pybind11's own error lists signatures instead.
template <typename T>
T as(const char* argument, const char* expected, const py::object& value) {
  try {
    return value.cast<T>();
  } catch (const py::cast_error&) {
    throw Error(std::string(argument) + " must be " + expected + ", got " + py::repr(value).cast<std::string>());
  }
}

int64_t integer(const char* argument, const py::object& value) { return as<int64_t>(argument, "an integer", value); }

bool boolean(const char* argument, const py::object& value) { return as<bool>(argument, "a bool", value); }

/// A count, kFromLogits for None.
int64_t count_or_from_logits(const char* argument, const py::object& value) {
  const auto count = as<std::optional<int64_t>>(argument, "an integer or None", value);
  ZEXPERT_CHECK(!count || *count >= 0, argument, " must not be negative, got ", *count);
  return count.value_or(kFromLogits);
}

ScoringFunc scoring_func_of(const py::object& value) {
  using EnumOrName = std::variant<ScoringFunc, std::string>;
  const auto enum_or_name = as<EnumOrName>("scoring_func", "a ScoringFunc or its name", value);
  const auto* name = std::get_if<std::string>(&enum_or_name);
  return name != nullptr ? parse_scoring_func(*name) : std::get<ScoringFunc>(enum_or_name);
}

std::optional<int64_t> known(int64_t count) {
  return count == kFromLogits ? std::nullopt : std::optional<int64_t>(count);
}

RoutingSpec make_spec(const py::object& top_k, const py::object& num_real_experts, const py::object& num_logits,
                      const py::object& num_identity_experts, const py::object& num_constant_experts,
                      const py::object& scoring_func, const py::object& renormalize,
                      const py::object& drop_before_renormalize, const py::object& routed_scaling_factor,
                      const py::object& num_expert_group, const py::object& topk_group, const py::object& num_experts) {
  RoutingSpec spec;
  spec.top_k = integer("top_k", top_k);
  spec.num_real_experts = integer("num_real_experts", num_real_experts);
  spec.num_logits = count_or_from_logits("num_logits", num_logits);
  if (!num_experts.is_none()) {  // the older name
    ZEXPERT_CHECK(num_logits.is_none(), "num_experts, the older name of num_logits, must be None with it, got ",
                  py::repr(num_experts).cast<std::string>());
    spec.num_logits = count_or_from_logits("num_experts", num_experts);
  }
  spec.num_identity_experts = count_or_from_logits("num_identity_experts", num_identity_experts);
  spec.num_constant_experts = integer("num_constant_experts", num_constant_experts);
  spec.scoring_func = scoring_func_of(scoring_func);
  spec.renormalize = boolean("renormalize", renormalize);
  spec.drop_before_renormalize = boolean("drop_before_renormalize", drop_before_renormalize);
  spec.routed_scaling_factor = as<double>("routed_scaling_factor", "a number", routed_scaling_factor);
  spec.num_expert_group = integer("num_expert_group", num_expert_group);
  spec.topk_group = integer("topk_group", topk_group);
  spec.validate();
  return spec;
}

/// The keyword arguments with which the constructor makes this spec.
py::dict keyword_arguments(const RoutingSpec& spec) {
  return py::dict(py::arg("top_k") = spec.top_k, py::arg("num_real_experts") = spec.num_real_experts,
                  py::arg("num_logits") = known(spec.num_logits),
                  py::arg("num_identity_experts") = known(spec.num_identity_experts),
                  py::arg("num_constant_experts") = spec.num_constant_experts,
                  py::arg("scoring_func") = name(spec.scoring_func), py::arg("renormalize") = spec.renormalize,
                  py::arg("drop_before_renormalize") = spec.drop_before_renormalize,
                  py::arg("routed_scaling_factor") = spec.routed_scaling_factor,
                  py::arg("num_expert_group") = spec.num_expert_group, py::arg("topk_group") = spec.topk_group);
}

std::string representation(const RoutingSpec& spec) {
  std::string text = "RoutingSpec(";
  const char* separator = "";
  for (const auto& [key, value] : keyword_arguments(spec)) {
    text += separator + py::str(key).cast<std::string>() + "=" + py::repr(value).cast<std::string>();
    separator = ", ";
  }
  return text + ")";
}

}  // namespace

void bind_routing_spec(py::module_& module) {
  py::class_<RoutingSpec> routing_spec(module, "RoutingSpec",
                                       "How tokens choose among experts ordered [real | identity | constant | drop]: "
                                       "checked when made, immutable afterwards.");
  routing_spec
      .def(py::init(&make_spec), py::kw_only(), py::arg("top_k"), py::arg("num_real_experts"),
           py::arg("num_logits") = py::none(), py::arg("num_identity_experts") = py::none(),
           py::arg("num_constant_experts") = 0, py::arg("scoring_func") = "softmax", py::arg("renormalize") = false,
           py::arg("drop_before_renormalize") = false, py::arg("routed_scaling_factor") = 1.0,
           py::arg("num_expert_group") = 1, py::arg("topk_group") = 1, py::arg("num_experts") = py::none())
      .def_readonly("top_k", &RoutingSpec::top_k)
      .def_readonly("num_real_experts", &RoutingSpec::num_real_experts)
      .def_property_readonly("num_logits", [](const RoutingSpec& spec) { return known(spec.num_logits); })
      .def_property_readonly("num_experts", [](const RoutingSpec& spec) { return known(spec.num_logits); })
      .def_property_readonly("num_identity_experts",
                             [](const RoutingSpec& spec) { return known(spec.num_identity_experts); })
      .def_readonly("num_constant_experts", &RoutingSpec::num_constant_experts)
      .def_property_readonly("num_drop_experts",
                             [](const RoutingSpec& spec) -> std::optional<int64_t> {
                               if (spec.num_logits == kFromLogits || spec.num_identity_experts == kFromLogits) {
                                 return std::nullopt;
                               }
                               return spec.num_drop_experts();
                             })
      .def_readonly("scoring_func", &RoutingSpec::scoring_func)
      .def_readonly("renormalize", &RoutingSpec::renormalize)
      .def_readonly("drop_before_renormalize", &RoutingSpec::drop_before_renormalize)
      .def_readonly("routed_scaling_factor", &RoutingSpec::routed_scaling_factor)
      .def_readonly("num_expert_group", &RoutingSpec::num_expert_group)
      .def_readonly("topk_group", &RoutingSpec::topk_group)
      .def("for_width", &RoutingSpec::for_width, py::arg("width"))
      .def(py::self == py::self)
      .def("__hash__",
           [](const RoutingSpec& spec) { return py::hash(py::tuple(keyword_arguments(spec).attr("values")())); })
      .def("__repr__", &representation)
      // A spec is immutable: a copy is the spec itself, as for str and tuple.
      .def("__copy__", [](py::object self) { return self; })
      .def(
          "__deepcopy__", [](py::object self, const py::dict&) { return self; }, py::arg("memo"))
      .def("__reduce__", [](const py::object& self) {
        const py::object partial = py::module_::import("functools").attr("partial");
        return py::make_tuple(partial(py::type::of(self), **keyword_arguments(self.cast<const RoutingSpec&>())),
                              py::tuple());
      });
  construct_in_new(routing_spec);
}

}  // namespace zexpert::python
