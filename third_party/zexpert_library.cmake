# SPDX-License-Identifier: Apache-2.0
# How every library and test of zexpert is compiled.

# Warnings are for zexpert's own code: others' headers come in as system headers.
function(zexpert_compile_options target)
  target_compile_features(${target} PUBLIC cxx_std_17)
  set(warnings -Wall -Wextra -Wpedantic -Wconversion -Wshadow)
  if(CMAKE_BUILD_TYPE AND NOT CMAKE_BUILD_TYPE STREQUAL "Debug")
    # Without optimisation GCC's intrinsics are macros, and their conversions would count as zexpert's.
    list(APPEND warnings -Wsign-conversion)
  endif()
  list(APPEND warnings -Werror=switch)  # a missing enumerator would compute another scoring function or type
  if(ZEXPERT_WERROR)
    list(APPEND warnings -Werror)
  endif()
  target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${warnings}>
                                           $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra,-Werror=switch>)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 13)
    # A fifth of the size; every driver for CUDA 13 can unpack it.
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)
  endif()
  if(ZEXPERT_SANITIZE)
    set(sanitize -fsanitize=${ZEXPERT_SANITIZE} -fno-sanitize-recover=all)
    target_compile_options(${target} PRIVATE $<$<COMPILE_LANGUAGE:CXX>:${sanitize};-fno-omit-frame-pointer>)
    target_link_options(${target} PRIVATE ${sanitize})
  endif()
endfunction()

# zexpert_add_library(NAME [SHARED] SOURCES...) makes zexpert::NAME, installed and exported in a set of its own, so that
# a program that uses the kernels alone needs neither PyTorch nor CUDA.
function(zexpert_add_library name)
  set(target zexpert_${name})
  set(export_set zexpert-${name})
  if(name STREQUAL "zexpert")
    set(target zexpert)
    set(export_set zexpert-torch)
  endif()
  add_library(${target} ${ARGN})
  add_library(zexpert::${name} ALIAS ${target})
  zexpert_compile_options(${target})
  target_include_directories(
    ${target}
    PUBLIC $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/csrc/include> $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>
    PRIVATE ${PROJECT_SOURCE_DIR}/csrc ${PROJECT_BINARY_DIR}/config)
  set_target_properties(${target} PROPERTIES
    EXPORT_NAME ${name}
    VERSION ${PROJECT_VERSION}
    SOVERSION ${PROJECT_VERSION_MAJOR}.${PROJECT_VERSION_MINOR}
    POSITION_INDEPENDENT_CODE ON
    VISIBILITY_INLINES_HIDDEN ON
    INSTALL_RPATH $ORIGIN
    INSTALL_RPATH_USE_LINK_PATH ON)
  get_target_property(type ${target} TYPE)
  if(type STREQUAL "SHARED_LIBRARY")
    set(exports ${PROJECT_SOURCE_DIR}/csrc/exports.map)
    target_link_options(${target} PRIVATE LINKER:--version-script=${exports})
    set_target_properties(${target} PROPERTIES LINK_DEPENDS ${exports})
  endif()
  install(TARGETS ${target} EXPORT ${export_set})
endfunction()

# zexpert_add_cuda_operators(TARGET SOURCES...): compiles the files that register operators a second time, for CUDA.
function(zexpert_add_cuda_operators target)
  set(sources)
  foreach(source IN LISTS ARGN)
    file(STRINGS ${source} for_each_device REGEX "#include \"torch/device.h\"")
    if(for_each_device)
      list(APPEND sources ${source})
    endif()
  endforeach()
  add_library(${target} OBJECT ${sources})
  zexpert_compile_options(${target})
  zexpert_torch_compile_definitions(${target} ${zexpert_torch_abi_target})
  target_compile_definitions(${target} PRIVATE USE_CUDA ZEXPERT_FOR_CUDA)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/csrc/include ${PROJECT_SOURCE_DIR}/csrc
                                               ${PROJECT_BINARY_DIR}/config)
  target_link_libraries(${target} PRIVATE TorchStable::torch_cpu TorchStable::torch_cuda CUDA::cudart_static)
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE ON VISIBILITY_INLINES_HIDDEN ON)
endfunction()

# TORCH_TARGET_VERSION as torch/csrc/stable/version.h spells it: major in the highest byte, minor in the next. It also
# turns every include of an unstable PyTorch header into an error.
function(zexpert_torch_compile_definitions target abi_target)
  string(REPLACE "." ";" parts ${abi_target})
  list(GET parts 0 major)
  list(GET parts 1 minor)
  math(EXPR value "(${major} << 56) | (${minor} << 48)" OUTPUT_FORMAT HEXADECIMAL)
  target_compile_definitions(${target} PRIVATE TORCH_TARGET_VERSION=${value})
endfunction()

# Writes config/zexpert_build_config.h, touching it only when something changed.
function(zexpert_write_build_config)
  set(ZEXPERT_VERSION ${PROJECT_VERSION})
  set(ZEXPERT_TORCH_ABI_TARGET ${zexpert_torch_abi_target})
  set(ZEXPERT_TORCH_BUILD_VERSION "${TorchStable_VERSION}")
  set(ZEXPERT_GIT_REVISION unknown)
  find_package(Git QUIET)
  if(Git_FOUND)
    execute_process(COMMAND ${GIT_EXECUTABLE} rev-parse --show-toplevel WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
                    OUTPUT_VARIABLE top_level OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
    # An unpacked source archive may be inside another repository.
    if(top_level STREQUAL PROJECT_SOURCE_DIR)
      execute_process(COMMAND ${GIT_EXECUTABLE} rev-parse --short=12 HEAD WORKING_DIRECTORY ${PROJECT_SOURCE_DIR}
                      OUTPUT_VARIABLE revision OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
      if(NOT failed)
        set(ZEXPERT_GIT_REVISION ${revision})
      endif()
    endif()
  endif()
  configure_file(${PROJECT_SOURCE_DIR}/csrc/zexpert_build_config.h.in
                 ${PROJECT_BINARY_DIR}/config/zexpert_build_config.h @ONLY)
  if(TorchStable_FOUND)
    set(ZEXPERT_TORCH_SUMMARY "yes (PyTorch ${TorchStable_VERSION}, stable ABI of ${zexpert_torch_abi_target})"
        PARENT_SCOPE)
  else()
    set(ZEXPERT_TORCH_SUMMARY "no" PARENT_SCOPE)
  endif()
endfunction()
