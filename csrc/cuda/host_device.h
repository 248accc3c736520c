// SPDX-License-Identifier: Apache-2.0
// What functions for the host and the device need.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define ZEXPERT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ZEXPERT_HOST_DEVICE inline
#endif

namespace zexpert::cuda {

ZEXPERT_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
ZEXPERT_HOST_DEVICE constexpr int round_up(int value, int step) { return (value + step - 1) / step * step; }

}  // namespace zexpert::cuda
