# SPDX-License-Identifier: Apache-2.0
# Finds the part of PyTorch that the stable ABI needs: its headers, libtorch_cpu and, if present, libtorch_cuda.
#
# PyTorch's own TorchConfig.cmake also demands everything PyTorch was built with, a matching CUDA toolkit for one, and
# passes on compile flags; the stable ABI needs none of that.
#
# Looks where CMAKE_PREFIX_PATH points, be it to libtorch or to torch.utils.cmake_prefix_path, at Torch_DIR, and at the
# PyTorch of the python3 in PATH. Makes
#   TorchStable::torch_cpu, TorchStable::torch_cuda (if there)
#   TorchStable_FOUND, TorchStable_VERSION
if(Torch_DIR)
  list(APPEND CMAKE_PREFIX_PATH ${Torch_DIR}/../../..)
endif()
if(NOT TorchStable_INCLUDE_DIR)
  find_program(TorchStable_PYTHON NAMES python3)
  mark_as_advanced(TorchStable_PYTHON)
  if(TorchStable_PYTHON)
    execute_process(
      COMMAND ${TorchStable_PYTHON} -c
              "import importlib.util; print(importlib.util.find_spec('torch').submodule_search_locations[0])"
      OUTPUT_VARIABLE python_torch OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
endif()

# ../../include: torch.utils.cmake_prefix_path is share/cmake
find_path(TorchStable_INCLUDE_DIR torch/csrc/stable/library.h PATH_SUFFIXES include ../../include
          HINTS ${python_torch})
get_filename_component(TorchStable_ROOT "${TorchStable_INCLUDE_DIR}" DIRECTORY)
find_library(TorchStable_CPU_LIBRARY torch_cpu HINTS ${TorchStable_ROOT}/lib NO_DEFAULT_PATH)
find_library(TorchStable_CUDA_LIBRARY torch_cuda HINTS ${TorchStable_ROOT}/lib NO_DEFAULT_PATH)
mark_as_advanced(TorchStable_INCLUDE_DIR TorchStable_CPU_LIBRARY TorchStable_CUDA_LIBRARY)

set(version_header ${TorchStable_INCLUDE_DIR}/torch/headeronly/version.h)
if(EXISTS ${version_header})
  file(STRINGS ${version_header} version_lines REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
  string(REGEX REPLACE "[^0-9;]" "" version_numbers "${version_lines}")
  list(JOIN version_numbers "." TorchStable_VERSION)
endif()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  TorchStable
  REQUIRED_VARS TorchStable_CPU_LIBRARY TorchStable_INCLUDE_DIR
  VERSION_VAR TorchStable_VERSION)

if(TorchStable_FOUND)
  foreach(name IN ITEMS cpu cuda)
    string(TOUPPER ${name} upper)
    if(TorchStable_${upper}_LIBRARY AND NOT TARGET TorchStable::torch_${name})
      add_library(TorchStable::torch_${name} SHARED IMPORTED)
      set_target_properties(TorchStable::torch_${name} PROPERTIES
        IMPORTED_LOCATION ${TorchStable_${upper}_LIBRARY}
        IMPORTED_NO_SONAME OFF
        INTERFACE_INCLUDE_DIRECTORIES ${TorchStable_INCLUDE_DIR})
    endif()
  endforeach()
endif()
