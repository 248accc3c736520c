# SPDX-License-Identifier: Apache-2.0
# Decides whether the CUDA kernels are built; by default as setup.py does. Needs no GPU.

# Sets ZEXPERT_WITH_CUDA, ZEXPERT_CUDA_SUMMARY and ZEXPERT_CUDA_ARCHS.
macro(zexpert_find_cuda)
  set(ZEXPERT_WITH_CUDA OFF)
  set(ZEXPERT_CUDA_ARCHS "")
  if(ZEXPERT_CUDA STREQUAL "OFF")
    set(ZEXPERT_CUDA_SUMMARY "no (ZEXPERT_CUDA=OFF)")
  elseif(ZEXPERT_CUDA STREQUAL "AUTO" AND NOT TARGET TorchStable::torch_cuda)
    set(ZEXPERT_CUDA_SUMMARY "no (no PyTorch with CUDA)")
  else()
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(ZEXPERT_WITH_CUDA ON)
    elseif(ZEXPERT_CUDA STREQUAL "ON")
      message(FATAL_ERROR "ZEXPERT_CUDA=ON, but nvcc is not found: pass -DCMAKE_CUDA_COMPILER=.../bin/nvcc")
    else()
      set(ZEXPERT_CUDA_SUMMARY "no (nvcc is not found)")
    endif()
  endif()

  if(ZEXPERT_WITH_CUDA)
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      # A100, H100/H200 and B200, and PTX for whatever comes later.
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 100)
    endif()
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    set(ZEXPERT_CUDA_ARCHS "${CMAKE_CUDA_ARCHITECTURES}")
    set(ZEXPERT_CUDA_SUMMARY "yes (CUDA ${CUDAToolkit_VERSION}, architectures ${CMAKE_CUDA_ARCHITECTURES})")
  endif()
endmacro()
