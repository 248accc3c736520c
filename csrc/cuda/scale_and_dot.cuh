// SPDX-License-Identifier: Apache-2.0
// The gradient of weight * row, the step that backward kernels share.
#pragma once

#include <cstdint>

#include "cuda/element_types.cuh"
#include "cuda/vector.cuh"

namespace zexpert::cuda {

/// target = weight * gradient, in one pass by `num_threads` threads of which this is number `thread`; returns its part
/// of <gradient, row>. Each thread keeps several sums: no load waits for an addition, and rounding errors stay small.
template <typename T, int kVector, typename A>
__device__ __forceinline__ A scale_and_dot(const T* __restrict__ gradient, A weight, const T* __restrict__ row,
                                           int64_t size, T* __restrict__ target, int thread, int num_threads) {
  constexpr int kSums = 8;
  constexpr int kSteps = kSums / kVector;
  using Elements = Vector<T, kVector>;
  const int64_t stride = int64_t{num_threads} * kVector;
  A sums[kSums] = {};
  for (int64_t first = int64_t{thread} * kVector; first < size; first += kSteps * stride) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int64_t i = first + step * stride;
      if (i < size) {
        Elements gradients = *reinterpret_cast<const Elements*>(gradient + i);
        const Elements elements = *reinterpret_cast<const Elements*>(row + i);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const A g = Computed<T>::from(gradients.values[v]);
          A& sum = sums[step * kVector + v];
          sum = fma(g, static_cast<A>(Computed<T>::from(elements.values[v])), sum);
          gradients.values[v] = Computed<T>::to(weight * g);
        }
        *reinterpret_cast<Elements*>(target + i) = gradients;
      }
    }
  }
#pragma unroll
  for (int half = kSums / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

}  // namespace zexpert::cuda
