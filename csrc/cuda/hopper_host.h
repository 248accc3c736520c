// SPDX-License-Identifier: Apache-2.0
// What the host needs to launch kernels for compute capability 9.0: the driver's tensor maps, and whether there is
// code.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

#include "cuda/launch.cuh"
#include "zexpert/error.h"

extern "C" const char* zexpert_cuda_architectures();  // build_info.cu

namespace zexpert::cuda {

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/// The driver's cuTensorMapEncodeTiled, looked up at run time: the library loads on machines without a driver.
inline EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    constexpr unsigned kCuda12 = 12000;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kCuda12, cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion");
    ZEXPERT_CHECK(result == cudaDriverEntryPointSuccess && found != nullptr,
                  "the CUDA driver must have cuTensorMapEncodeTiled, which CUDA 12.0 introduced; query result ",
                  static_cast<int>(result));
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

/// The kernels' code is in sm_90a alone, which CMake calls 90a and TORCH_CUDA_ARCH_LIST 9.0a.
inline bool is_compiled_for_hopper() {
  const char* const architectures = zexpert_cuda_architectures();
  return std::strstr(architectures, "90a") != nullptr || std::strstr(architectures, "9.0a") != nullptr;
}

}  // namespace zexpert::cuda
