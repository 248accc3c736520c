// Conversions between the types of data and the type that kernels compute in. PyTorch's build forbids CUDA's implicit
// ones.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace zexpert::cuda {

template <typename T>
__device__ __forceinline__ float to_float(T value) {
  return static_cast<float>(value);
}
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 value) {
  return __bfloat162float(value);
}
template <>
__device__ __forceinline__ float to_float(__half value) {
  return __half2float(value);
}

/// The type values of T are computed in: float64 for float64, float32 for all else.
template <typename T>
struct Computed {
  using type = float;
  __device__ static float from(T value) { return to_float(value); }
  __device__ static T to(float value) { return static_cast<T>(value); }
};
template <>
struct Computed<double> {
  using type = double;
  __device__ static double from(double value) { return value; }
  __device__ static double to(double value) { return value; }
};
template <>
__device__ __forceinline__ __nv_bfloat16 Computed<__nv_bfloat16>::to(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half Computed<__half>::to(float value) {
  return __float2half_rn(value);
}

}  // namespace zexpert::cuda
