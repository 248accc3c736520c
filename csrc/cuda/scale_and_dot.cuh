// The gradient of weight * row, the step that backward kernels share.
#pragma once

#include <cstdint>

#include "cuda/element_types.cuh"
#include "cuda/vector.cuh"

namespace zexpert::cuda {

/// target = weight * gradient, in one pass by `num_threads` threads of which this is number `thread`; returns its part
/// of <gradient, row>.
template <typename T, int kVector, typename A>
__device__ __forceinline__ A scale_and_dot(const T* __restrict__ gradient, A weight, const T* __restrict__ row,
                                           int64_t size, T* __restrict__ target, int thread, int num_threads) {
  using Elements = Vector<T, kVector>;
  A sum = 0;
#pragma unroll 4
  for (int64_t i = int64_t{thread} * kVector; i < size; i += int64_t{num_threads} * kVector) {
    Elements gradients = *reinterpret_cast<const Elements*>(gradient + i);
    const Elements elements = *reinterpret_cast<const Elements*>(row + i);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const A g = Computed<T>::from(gradients.values[v]);
      sum += g * Computed<T>::from(elements.values[v]);
      gradients.values[v] = Computed<T>::to(weight * g);
    }
    *reinterpret_cast<Elements*>(target + i) = gradients;
  }
  return sum;
}

}  // namespace zexpert::cuda
