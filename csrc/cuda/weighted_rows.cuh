// SPDX-License-Identifier: Apache-2.0
// The weighted sum of a token's rows.
#pragma once

#include <cstdint>

#include "cuda/reduce.cuh"
#include "cuda/types.cuh"
#include "cuda/vector.cuh"

namespace zexpert::cuda {

/// Adds weights[k] * rows[indices[k]] to this thread's vector of columns, which begins at `rows`, for every k with an
/// index in [0, num_rows), in the order of k. Null weights are all 1. The whole warp must call this with the same
/// indices and weights; a thread that is not `active` reads no rows. The loads of kAtOnce rows are in flight at a time.
/// Returns whether there was a row.
template <typename T, int kVector, int kAtOnce, typename A>
__device__ __forceinline__ bool add_weighted_rows(const T* rows, int64_t row_stride, int64_t num_rows,
                                                  const int32_t* indices, const A* weights, int64_t count, bool active,
                                                  A (&sums)[kVector]) {
  const auto lane = static_cast<int>(threadIdx.x % kWarpSize);
  bool any = false;
  for (int64_t first = 0; first < count; first += kWarpSize) {
    int32_t own_index = -1;
    A own_weight = 1;
    if (first + lane < count) {
      own_index = indices[first + lane];
      if (weights != nullptr)
        own_weight = weights[first + lane];
    }
    unsigned remaining = __ballot_sync(kFullMask, own_index >= 0 && own_index < num_rows);
    any = any || remaining != 0;
    while (remaining != 0) {
      Words<T, kVector> words[kAtOnce];
      A factors[kAtOnce];
      int num_taken = 0;
      // Load
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (remaining != 0) {
          const int holder = __ffs(static_cast<int>(remaining)) - 1;
          remaining &= remaining - 1;
          const int64_t row = __shfl_sync(kFullMask, own_index, holder);
          factors[i] = __shfl_sync(kFullMask, own_weight, holder);
          if (active)
            words[i] = load_once<T, kVector>(rows + row * row_stride);
          num_taken = i + 1;
        }
      }
      // Add
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (i < num_taken) {
          const Vector<T, kVector> elements = to_vector<T, kVector>(words[i]);
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
            sums[v] = fma(factors[i], static_cast<A>(Computed<T>::from(elements.values[v])), sums[v]);
          }
        }
      }
    }
  }
  return any;
}

}  // namespace zexpert::cuda
