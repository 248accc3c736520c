// SPDX-License-Identifier: Apache-2.0
// float8_e4m3fn elements with a scale for each block: value = element * scale.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

namespace zexpert::cuda {

/// The scale of a block of float8 elements: its largest magnitude becomes the largest of the type.
__device__ __forceinline__ float float8_scale(float largest_magnitude) {
  constexpr float kLeast = 1e-10F;  // the block of zeros: so that the scale has an inverse
  constexpr float kMost = 448.0F;
  return fmaxf(largest_magnitude, kLeast) / kMost;
}

__device__ __forceinline__ uint32_t packed_float8(float low, float high) {
  return __nv_cvt_float2_to_fp8x2({low, high}, __NV_SATFINITE, __NV_E4M3);
}

}  // namespace zexpert::cuda
