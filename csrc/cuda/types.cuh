// SPDX-License-Identifier: Apache-2.0
// The types of data, the type that kernels compute in, and conversions between them. PyTorch's build forbids CUDA's
// implicit conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "zexpert/error.h"
#include "zexpert/scalar_types.h"

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

/// is_floating() as a constant: device code cannot call the function.
template <ScalarType type>
inline constexpr bool kIsFloating = is_floating(type);

/// The CUDA type of a floating ScalarType.
template <ScalarType type>
struct DeviceTypeOf;
template <>
struct DeviceTypeOf<ScalarType::kFloat32> {
  using type = float;
};
template <>
struct DeviceTypeOf<ScalarType::kFloat64> {
  using type = double;
};
template <>
struct DeviceTypeOf<ScalarType::kBFloat16> {
  using type = __nv_bfloat16;
};
template <>
struct DeviceTypeOf<ScalarType::kFloat16> {
  using type = __half;
};
template <ScalarType type>
using DeviceType = typename DeviceTypeOf<type>::type;

/// Calls `fn` with an element of the type: float32, bfloat16 or float16. Throws Error for any other.
template <typename Fn>
void visit_data_type(ScalarType type, Fn&& fn) {
  switch (type) {
    case ScalarType::kFloat32: return fn(float{});
    case ScalarType::kBFloat16: return fn(__nv_bfloat16{});
    case ScalarType::kFloat16: return fn(__half{});
    case ScalarType::kFloat64:
    case ScalarType::kInt32:
    case ScalarType::kInt64: break;
  }
  zexpert::detail::throw_error("data must be float32, bfloat16 or float16, got ", name(type));
}

/// The same with float64.
template <typename Fn>
void visit_any_data_type(ScalarType type, Fn&& fn) {
  switch (type) {
    case ScalarType::kFloat32: return fn(float{});
    case ScalarType::kFloat64: return fn(double{});
    case ScalarType::kBFloat16: return fn(__nv_bfloat16{});
    case ScalarType::kFloat16: return fn(__half{});
    case ScalarType::kInt32:
    case ScalarType::kInt64: break;
  }
  zexpert::detail::throw_error("data must be of a floating type, got ", name(type));
}

}  // namespace zexpert::cuda
