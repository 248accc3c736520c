// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_permute.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kThreads = 256;

/// A block per row; T is as wide as an element, whatever it holds.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) moe_permute(const MoePermuteParams params, const int32_t* last_offset) {
  using Elements = Vector<T, kVector>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t row = blockIdx.x;
  const int32_t slot = params.row_slots[row];
  if (row >= *last_offset || slot < 0 || slot >= params.num_tokens * params.top_k)
    return;
  const int64_t token = slot / static_cast<int32_t>(params.top_k);
  const T* __restrict__ source = static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride;
  T* __restrict__ target = static_cast<T*>(params.rows) + row * params.hidden_size;
#pragma unroll 4
  for (int64_t i = int64_t{threadIdx.x} * kVector; i < params.hidden_size; i += int64_t{blockDim.x} * kVector) {
    *reinterpret_cast<Elements*>(target + i) = *reinterpret_cast<const Elements*>(source + i);
  }
}

/// A thread per vector of a token, which is read once and written to all of the token's rows.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    moe_permute_by_token(const MoePermuteParams params, const int blocks_per_token) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  const auto [token, column] = own_vector<kVector>(blocks_per_token);
  if (column >= params.hidden_size)
    return;
  using Elements = Vector<T, kVector>;
  const Elements elements = *reinterpret_cast<const Elements*>(static_cast<const T*>(params.hidden_states) +
                                                               token * params.hidden_row_stride + column);
  T* const target = static_cast<T*>(params.rows) + column;
  const int32_t* const own_rows = params.slot_rows + token * params.top_k;
  constexpr int kAtOnce = 4;  // loads in flight: their latency is what this costs where tokens are few
  for (int64_t first = 0; first < params.top_k; first += kAtOnce) {
    int32_t rows[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) rows[i] = first + i < params.top_k ? own_rows[first + i] : -1;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (rows[i] >= 0 && rows[i] < params.num_rows)
        *reinterpret_cast<Elements*>(target + rows[i] * params.hidden_size) = elements;
    }
  }
}

template <typename T>
void launch_moe_permute(const MoePermuteParams& params, const int32_t* last_offset, cudaStream_t stream) {
  const bool fits = fits_vectors(params.hidden_states, params.hidden_row_stride, sizeof(T)) &&
                    fits_vectors(params.rows, params.hidden_size, sizeof(T));
  visit_vector<T>(fits, params.hidden_size, [&](auto vector) {
    const int threads = threads_for_row<vector.value>(params.hidden_size, kThreads);
    if (params.slot_rows == nullptr) {
      launch("moe_permute", &moe_permute<T, vector.value>, params.num_rows, threads, 0, stream, params, last_offset);
      return;
    }
    const int64_t blocks_per_token = blocks_for_row<vector.value>(params.hidden_size, threads);
    launch("moe_permute", &moe_permute_by_token<T, vector.value>, params.num_tokens * blocks_per_token, threads, 0,
           stream, params, static_cast<int>(blocks_per_token));
  });
}

}  // namespace
}  // namespace cuda

void moe_permute_cuda(const MoePermuteParams& params, const int32_t* last_offset, cudaStream_t stream) {
  if (params.num_rows == 0 || params.hidden_size == 0) {
    return;
  }
  switch (params.data_type) {
    case ScalarType::kFloat64: return cuda::launch_moe_permute<uint64_t>(params, last_offset, stream);
    case ScalarType::kBFloat16:
    case ScalarType::kFloat16: return cuda::launch_moe_permute<uint16_t>(params, last_offset, stream);
    default: return cuda::launch_moe_permute<uint32_t>(params, last_offset, stream);
  }
}

}  // namespace zexpert
