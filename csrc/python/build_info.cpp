// SPDX-License-Identifier: Apache-2.0
#include <string>

#include "bindings.h"
#include "zexpert/cpu_capability.h"
#include "zexpert_build_config.h"

namespace py = pybind11;

namespace zexpert::python {
namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("Clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("GCC ") + __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  const py::object archs = py::str(ZEXPERT_CUDA_ARCHS).attr("replace")(";", " ").attr("split")();
  return py::dict(py::arg("version") = ZEXPERT_VERSION, py::arg("git_revision") = ZEXPERT_GIT_REVISION,
                  py::arg("compiler") = compiler(), py::arg("torch_abi_target") = ZEXPERT_TORCH_ABI_TARGET,
                  py::arg("torch_build_version") = ZEXPERT_TORCH_BUILD_VERSION, py::arg("cuda_archs") = archs,
                  py::arg("cpu_capability") = name(cpu_capability()));
}

}  // namespace

void bind_build_info(py::module_& module) { module.def("build_info", &build_info); }

}  // namespace zexpert::python
