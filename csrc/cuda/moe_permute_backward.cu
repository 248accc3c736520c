// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_permute_backward.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/element_types.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "cuda/weighted_rows.cuh"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocksPerMultiprocessor = 8;  // enough loads in flight, and registers for eight rows

/// slot_rows[s] = the row that slot s has, where it has one.
__global__ void __launch_bounds__(kThreads)
    invert_row_slots(const int32_t* row_slots, int64_t num_rows, int64_t num_slots, const int32_t* last_offset,
                     int32_t* slot_rows) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= num_rows || row >= *last_offset)
    return;
  const int32_t slot = row_slots[row];
  if (slot >= 0 && slot < num_slots)
    slot_rows[slot] = static_cast<int32_t>(row);
}

/// A thread per vector of a token's gradient.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    moe_permute_backward(const MoePermuteBackwardParams params, const int32_t* slot_rows, const int blocks_per_row) {
  using A = typename Computed<T>::type;
  using Elements = Vector<T, kVector>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const auto [token, column] = own_vector<kVector>(blocks_per_row);
  const bool active = column < params.hidden_size;
  A sums[kVector] = {};
  constexpr int kRowsAtOnce = sizeof(A) == sizeof(double) ? 4 : 8;
  add_weighted_rows<T, kVector, kRowsAtOnce>(
      static_cast<const T*>(params.grad_rows) + column, params.grad_rows_row_stride, params.num_rows,
      slot_rows + token * params.top_k, static_cast<const A*>(nullptr), params.top_k, active, sums);
  if (!active)
    return;
  Elements result;
#pragma unroll
  for (int v = 0; v < kVector; ++v) result.values[v] = Computed<T>::to(sums[v]);
  *reinterpret_cast<Elements*>(static_cast<T*>(params.grad_hidden_states) + token * params.hidden_size + column) =
      result;
}

}  // namespace
}  // namespace cuda

void moe_permute_backward_cuda(const MoePermuteBackwardParams& params, const int32_t* last_offset, int32_t* slot_rows,
                               cudaStream_t stream) {
  if (params.num_tokens == 0 || params.hidden_size == 0) {
    return;
  }
  const int64_t num_slots = params.num_tokens * params.top_k;
  cuda::check(cudaMemsetAsync(slot_rows, 0xff, sizeof(int32_t) * static_cast<size_t>(num_slots), stream),
              "moe_permute_backward");
  if (params.num_rows > 0) {
    cuda::launch("moe_permute_backward", &cuda::invert_row_slots,
                 (params.num_rows + cuda::kThreads - 1) / cuda::kThreads, cuda::kThreads, 0, stream, params.row_slots,
                 params.num_rows, num_slots, last_offset, slot_rows);
  }
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    using T = decltype(element);
    const bool fits = cuda::fits_vectors(params.grad_rows, params.grad_rows_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.grad_hidden_states, params.hidden_size, sizeof(T));
    cuda::visit_vector<T>(fits, params.hidden_size, [&](auto vector) {
      const int threads = cuda::threads_for_row<vector.value>(params.hidden_size, cuda::kThreads);
      const int64_t blocks_per_row = cuda::blocks_for_row<vector.value>(params.hidden_size, threads);
      cuda::launch("moe_permute_backward", &cuda::moe_permute_backward<T, vector.value>,
                   params.num_tokens * blocks_per_row, threads, 0, stream, params,
                   static_cast<const int32_t*>(slot_rows), static_cast<int>(blocks_per_row));
    });
  });
}

}  // namespace zexpert
