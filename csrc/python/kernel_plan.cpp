// SPDX-License-Identifier: Apache-2.0
#include "zexpert/kernel_plan.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>

#include "bindings.h"

namespace py = pybind11;

namespace zexpert::python {

void bind_kernel_plan(py::module_& module) {
  py::class_<KernelPlan>(module, "KernelPlan", "The kernel that an operator call runs, and why.")
      .def_static(
          "__new__",
          [](const py::args&, const py::kwargs&) { throw py::type_error("KernelPlan is made by kernel_plan() alone"); })
      .def_readonly("op", &KernelPlan::op)
      .def_readonly("backend", &KernelPlan::backend)
      .def_readonly("kernel", &KernelPlan::kernel)
      .def_readonly("reason", &KernelPlan::reason)
      .def_readonly("implementation", &KernelPlan::implementation)
      .def("__repr__", [](const KernelPlan& plan) {
        return py::str("KernelPlan(op={!r}, backend={!r}, kernel={!r}, reason={!r})")
            .format(plan.op, plan.backend, plan.kernel, plan.reason);
      });

  module.def(
      "kernel_plan",
      [](std::string op, std::string device, std::optional<std::string> dtype, std::optional<std::string> weight_dtype,
         std::optional<int64_t> num_tokens, std::optional<int64_t> num_rows, std::optional<int64_t> num_experts,
         std::optional<int64_t> num_logits, std::optional<int64_t> top_k, std::optional<int64_t> hidden_size,
         std::optional<int64_t> intermediate_size, std::optional<int64_t> compute_capability, bool has_hopper_code,
         bool keep_gate_up, std::string implementation) {
        KernelQuery query;
        query.op = std::move(op);
        query.device = std::move(device);
        query.dtype = std::move(dtype);
        query.weight_dtype = std::move(weight_dtype);
        query.num_tokens = num_tokens;
        query.num_rows = num_rows;
        query.num_experts = num_experts;
        query.num_logits = num_logits;
        query.top_k = top_k;
        query.hidden_size = hidden_size;
        query.intermediate_size = intermediate_size;
        query.compute_capability = compute_capability;
        query.has_hopper_code = has_hopper_code;
        query.keep_gate_up = keep_gate_up;
        query.implementation = std::move(implementation);
        return kernel_plan(query);
      },
      py::arg("op"), py::kw_only(), py::arg("device") = "cpu", py::arg("dtype") = py::none(),
      py::arg("weight_dtype") = py::none(), py::arg("num_tokens") = py::none(), py::arg("num_rows") = py::none(),
      py::arg("num_experts") = py::none(), py::arg("num_logits") = py::none(), py::arg("top_k") = py::none(),
      py::arg("hidden_size") = py::none(), py::arg("intermediate_size") = py::none(),
      py::arg("compute_capability") = py::none(), py::arg("has_hopper_code") = true, py::arg("keep_gate_up") = true,
      py::arg("implementation") = "auto");
}

}  // namespace zexpert::python
