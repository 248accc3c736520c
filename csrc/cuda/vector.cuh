// SPDX-License-Identifier: Apache-2.0
// Rows moved by the widest accesses that their alignment allows.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/reduce.cuh"

namespace zexpert::cuda {

inline constexpr int64_t kWidestAccess = 16;  // bytes

/// kVector consecutive elements.
template <typename T, int kVector>
struct alignas(sizeof(T) * kVector < kWidestAccess ? sizeof(T) * kVector : kWidestAccess) Vector {
  T values[kVector];
};

/// A vector as it waits in registers: separate elements of 16 bits would need a register each.
template <typename T, int kVector>
using Words = std::conditional_t<sizeof(Vector<T, kVector>) == sizeof(uint4), uint4, Vector<T, kVector>>;

template <typename T, int kVector>
__device__ __forceinline__ Vector<T, kVector> to_vector(const Words<T, kVector>& words) {
  Vector<T, kVector> vector;
  memcpy(&vector, &words, sizeof(vector));
  return vector;
}

template <typename T, int kVector>
__device__ __forceinline__ Words<T, kVector> to_words(const Vector<T, kVector>& vector) {
  Words<T, kVector> words;
  memcpy(&words, &vector, sizeof(words));
  return words;
}

// Accesses to data that is read or written once: they displace no data that is needed again.

template <typename T, int kVector>
__device__ __forceinline__ Words<T, kVector> load_once(const T* source) {
  if constexpr (std::is_same_v<Words<T, kVector>, uint4>) {
    return __ldcs(reinterpret_cast<const uint4*>(source));
  } else {
    return *reinterpret_cast<const Words<T, kVector>*>(source);
  }
}

template <typename T, int kVector>
__device__ __forceinline__ void store_once(T* target, const Words<T, kVector>& words) {
  if constexpr (std::is_same_v<Words<T, kVector>, uint4>) {
    __stcs(reinterpret_cast<uint4*>(target), words);
  } else {
    *reinterpret_cast<Words<T, kVector>*>(target) = words;
  }
}

/// Whether a row does work; `last_offset` is in device memory, or null: all rows do.
__device__ __forceinline__ bool does_work(const int32_t* last_offset, int64_t row) {
  return last_offset == nullptr || row < *last_offset;
}

/// Whether every row begins where the widest access may.
inline bool fits_vectors(const void* data, int64_t row_stride, int64_t element_size) {
  return reinterpret_cast<uintptr_t>(data) % kWidestAccess == 0 && row_stride * element_size % kWidestAccess == 0;
}

/// Calls `fn` with the number of elements of T to move at a time, as an integral_constant: one if rows do not fit
/// vectors or do not consist of whole ones.
template <typename T, typename Fn>
void visit_vector(bool fits, int64_t row_size, Fn&& fn) {
  constexpr int kVector = static_cast<int>(kWidestAccess / sizeof(T));
  if (fits && row_size % kVector == 0) {
    fn(std::integral_constant<int, kVector>{});
  } else {
    fn(std::integral_constant<int, 1>{});
  }
}

/// Threads for a block that walks one row, a vector per thread and step.
template <int kVector>
int threads_for_row(int64_t row_size, int most) {
  const int64_t warps = (row_size + int64_t{kWarpSize} * kVector - 1) / (int64_t{kWarpSize} * kVector);
  return warps * kWarpSize < most ? static_cast<int>(warps < 1 ? 1 : warps) * kWarpSize : most;
}

/// Blocks for a row with a thread per vector. The blocks of a row are next to each other in the grid.
template <int kVector>
int64_t blocks_for_row(int64_t row_size, int threads) {
  const int64_t columns_per_block = int64_t{threads} * kVector;
  return (row_size + columns_per_block - 1) / columns_per_block;
}

/// The thread's vector in such a grid. The column may be past the end of the row.
struct OwnVector {
  int64_t row;
  int64_t column;
};
template <int kVector>
__device__ __forceinline__ OwnVector own_vector(int blocks_per_row) {
  const int64_t row = blockIdx.x / static_cast<unsigned>(blocks_per_row);
  const int64_t block_of_row = blockIdx.x % static_cast<unsigned>(blocks_per_row);
  return {row, (block_of_row * blockDim.x + threadIdx.x) * kVector};
}

}  // namespace zexpert::cuda
