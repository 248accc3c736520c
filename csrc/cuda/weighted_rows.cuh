// SPDX-License-Identifier: Apache-2.0
// Sums of rows with weights, the heart of moe_finalize and of moe_permute's backward.
#pragma once

#include <cstdint>

#include "cuda/element_types.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace zexpert::cuda {

/// Adds weights[k] * rows[indices[k]], for every k whose index is in [0, num_rows) and in the order of k, to this
/// thread's vector of columns, which begins at `rows`; weights may be null: all 1. The whole warp calls this, with the
/// same indices and weights; a thread that is not `active` reads no rows. The loads of kAtOnce rows are in flight at a
/// time.
template <typename T, int kVector, int kAtOnce, typename A>
__device__ __forceinline__ void add_weighted_rows(const T* rows, int64_t row_stride, int64_t num_rows,
                                                  const int32_t* indices, const A* weights, int64_t count, bool active,
                                                  A (&sums)[kVector]) {
  const auto lane = static_cast<int>(threadIdx.x % kWarpSize);
  for (int64_t first = 0; first < count; first += kWarpSize) {
    int32_t own_index = -1;
    A own_weight = 1;
    if (first + lane < count) {
      own_index = indices[first + lane];
      if (weights != nullptr)
        own_weight = weights[first + lane];
    }
    unsigned remaining = __ballot_sync(kFullMask, own_index >= 0 && own_index < num_rows);
    while (remaining != 0) {
      Words<T, kVector> words[kAtOnce];
      A factors[kAtOnce];
      int num_taken = 0;
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
}

}  // namespace zexpert::cuda
