// SPDX-License-Identifier: Apache-2.0
// A row of logits, and the bias, in the registers of a warp: loads and stores for warp.cuh.
#pragma once

#include <cstdint>

#include "cuda/biased_topk/common.cuh"

namespace zexpert::cuda {

/// A row of kRowWidth logits in a warp's registers: element v of load j of a lane is expert
/// (j * 32 + lane) * kVector + v.
template <typename Logit, int kRowWidth>
struct RowLayout {
  static constexpr int kWidth = kRowWidth;
  static constexpr int kPerLane = kWidth / kWarpSize;
  static constexpr int kVector = sizeof(Logit) == 2 && kPerLane % 8 == 0 ? 8 : kPerLane % 4 == 0 ? 4 : 2;
  static constexpr int kLoads = kPerLane / kVector;
  static_assert(kLoads * kVector * kWarpSize == kWidth, "a warp's loads must divide the row evenly");
  static_assert(kPerLane <= 32, "a lane's elements must fit the bits of a word");

  __device__ static int expert(int lane, int element) {
    const auto i = static_cast<unsigned>(element);
    return static_cast<int>((i / kVector * kWarpSize + static_cast<unsigned>(lane)) * kVector + i % kVector);
  }
  /// The expert at place element * 32 + lane.
  __device__ static int expert_of_place(unsigned place) {
    return expert(static_cast<int>(place % kWarpSize), static_cast<int>(place / kWarpSize));
  }
};

/// Loads a lane's part of an aligned row.
template <typename Layout, typename T>
__device__ __forceinline__ void load_vectors(const T* row, int lane, float (&values)[Layout::kPerLane]) {
  constexpr int kVector = Layout::kVector;
  const T* own = row + lane * kVector;
#pragma unroll
  for (int j = 0; j < Layout::kLoads; ++j) {
    float vector[kVector];
    load_vector<kVector>(own + j * kWarpSize * kVector, vector);
#pragma unroll
    for (int v = 0; v < kVector; ++v) values[j * kVector + v] = vector[v];
  }
}

/// Adds a lane's part of an aligned row to `values`.
template <typename Layout, typename T>
__device__ __forceinline__ void add_vectors(const T* row, int lane, float (&values)[Layout::kPerLane]) {
  constexpr int kVector = Layout::kVector;
  const T* own = row + lane * kVector;
#pragma unroll
  for (int j = 0; j < Layout::kLoads; ++j) {
    float vector[kVector];
    load_vector<kVector>(own + j * kWarpSize * kVector, vector);
#pragma unroll
    for (int v = 0; v < kVector; ++v) values[j * kVector + v] = __fadd_rn(values[j * kVector + v], vector[v]);
  }
}

/// Loads a lane's part of a row of any alignment, with NaN past its end.
template <typename Layout, typename T>
__device__ __forceinline__ void load_row(const T* row, bool fits_vectors, int num_experts, int lane,
                                         float (&values)[Layout::kPerLane]) {
  if (__builtin_expect(fits_vectors, 1)) {
    load_vectors<Layout>(row, lane, values);
  } else {
    const T* own = row + lane * Layout::kVector;
#pragma unroll
    for (int i = 0; i < Layout::kPerLane; ++i) {
      values[i] = Layout::expert(lane, i) < num_experts ? to_float(own[Layout::expert(0, i)]) : NAN;
    }
  }
}

/// Stores a lane's part of a row of any alignment.
template <typename Layout, typename T>
__device__ __forceinline__ void store_row(T* row, bool fits_vectors, int num_experts, int lane,
                                          const float (&values)[Layout::kPerLane]) {
  constexpr int kVector = Layout::kVector;
  T* own = row + lane * kVector;
  if (fits_vectors) {
#pragma unroll
    for (int j = 0; j < Layout::kLoads; ++j) {
      Vector<T, kVector> vector;
#pragma unroll
      for (int v = 0; v < kVector; ++v) vector.values[v] = Computed<T>::to(values[j * kVector + v]);
      *reinterpret_cast<Vector<T, kVector>*>(own + j * kWarpSize * kVector) = vector;
    }
  } else {
#pragma unroll
    for (int i = 0; i < Layout::kPerLane; ++i) {
      if (Layout::expert(lane, i) < num_experts)
        own[Layout::expert(0, i)] = Computed<T>::to(values[i]);
    }
  }
}

/// The bias as float32 on a vector's boundary. A bias of another form is converted into shared memory `staged`; then
/// the whole block must call this.
__device__ __forceinline__ const float* prepare_bias(const RoutingArguments& arguments, int width, float* staged) {
  if (arguments.bias == nullptr || arguments.bias_fits_vectors)
    return static_cast<const float*>(arguments.bias);
  for (int i = static_cast<int>(threadIdx.x); i < width; i += static_cast<int>(blockDim.x)) {
    staged[i] = i < arguments.num_experts ? load_as_float(arguments.bias, arguments.bias_type, i) : 0.0F;
  }
  __syncthreads();
  return staged;
}

}  // namespace zexpert::cuda
