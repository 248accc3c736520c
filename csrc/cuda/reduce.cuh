// SPDX-License-Identifier: Apache-2.0
// Sums over the threads of a warp or a block, in an order that is the same in every run.
#pragma once

#include <cuda_runtime.h>

namespace zexpert::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffU;

/// The sum of every lane's value; the same bits in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

/// The sum of the values of the threads before this one in the block. All threads must call it. `warp_sums` is shared
/// memory for a number per warp.
__device__ __forceinline__ int block_exclusive_sum(int value, int* warp_sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int sum = value;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int before = __shfl_up_sync(kFullMask, sum, offset);
    sum += lane >= offset ? before : 0;
  }
  if (lane == kWarpSize - 1)
    warp_sums[warp] = sum;
  __syncthreads();
  int base = 0;
  for (int other = 0; other < warp; ++other) base += warp_sums[other];
  return base + sum - value;
}

/// The sum of every thread's value, valid in thread 0. `scratch` is shared memory for a value per warp.
template <typename A>
__device__ __forceinline__ A block_sum(A value, A* scratch) {
  value = warp_sum(value);
  __syncthreads();  // the scratch may still be read for the sum before
  if (threadIdx.x % kWarpSize == 0)
    scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  A total = 0;
  for (unsigned warp = 0; warp < blockDim.x / kWarpSize; ++warp) total += scratch[warp];
  return total;
}

}  // namespace zexpert::cuda
