// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_finalize_backward.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/element_types.cuh"
#include "cuda/launch.cuh"
#include "cuda/scale_and_dot.cuh"
#include "cuda/vector.cuh"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kThreads = 256;

/// A block per token, a warp per slot; the one after the last is the token itself. The warps share the token's grad_out
/// in the cache.
template <typename T, int kVector>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    moe_finalize_backward(const MoeFinalizeBackwardParams params, uint8_t* row_has_slot) {
  using A = typename Computed<T>::type;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t token = blockIdx.x;
  const auto lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int64_t size = params.hidden_size;
  const T* grad_out = static_cast<const T*>(params.grad_out) + token * params.grad_out_row_stride;
  for (int64_t k = threadIdx.x / kWarpSize; k <= params.top_k; k += blockDim.x / kWarpSize) {
    if (k == params.top_k) {
      const A dot = warp_sum(
          scale_and_dot<T, kVector>(grad_out, static_cast<const A*>(params.zero_weight)[token],
                                    static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride,
                                    size, static_cast<T*>(params.grad_hidden_states) + token * size, lane, kWarpSize));
      if (lane == 0)
        static_cast<A*>(params.grad_zero_weight)[token] = dot;
      return;
    }
    const int64_t slot = token * params.top_k + k;
    const int64_t row = params.slot_rows[slot];
    A dot = 0;
    if (row >= 0 && row < params.num_rows) {
      dot = warp_sum(scale_and_dot<T, kVector>(grad_out, static_cast<const A*>(params.topk_weights)[slot],
                                               static_cast<const T*>(params.rows) + row * params.rows_row_stride, size,
                                               static_cast<T*>(params.grad_rows) + row * size, lane, kWarpSize));
      if (lane == 0)
        row_has_slot[row] = 1;
    }
    if (lane == 0)
      static_cast<A*>(params.grad_topk_weights)[slot] = dot;
  }
}

/// A block per row.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) zero_rows_without_slot(T* rows, int64_t size, const uint8_t* row_has_slot) {
  using Elements = Vector<T, kVector>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (row_has_slot[blockIdx.x] != 0)
    return;
  T* row = rows + blockIdx.x * size;
  for (int64_t i = int64_t{threadIdx.x} * kVector; i < size; i += int64_t{blockDim.x} * kVector) {
    *reinterpret_cast<Elements*>(row + i) = Elements{};
  }
}

}  // namespace
}  // namespace cuda

void moe_finalize_backward_cuda(const MoeFinalizeBackwardParams& params, uint8_t* row_has_slot, cudaStream_t stream) {
  if (params.num_rows > 0) {
    cuda::check(cudaMemsetAsync(row_has_slot, 0, static_cast<size_t>(params.num_rows), stream),
                "moe_finalize_backward");
  }
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    using T = decltype(element);
    const bool fits = cuda::fits_vectors(params.grad_out, params.grad_out_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.rows, params.rows_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.hidden_states, params.hidden_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.grad_rows, params.hidden_size, sizeof(T)) &&
                      cuda::fits_vectors(params.grad_hidden_states, params.hidden_size, sizeof(T));
    cuda::visit_vector<T>(fits, params.hidden_size, [&](auto vector) {
      if (params.num_tokens > 0) {
        const auto warps = static_cast<int>(std::min<int64_t>(params.top_k + 1, cuda::kMaxWarps));
        cuda::launch("moe_finalize_backward", &cuda::moe_finalize_backward<T, vector.value>, params.num_tokens,
                     warps * cuda::kWarpSize, 0, stream, params, row_has_slot);
      }
      if (params.num_rows > 0 && params.hidden_size > 0) {
        cuda::launch("moe_finalize_backward", &cuda::zero_rows_without_slot<T, vector.value>, params.num_rows,
                     cuda::threads_for_row<vector.value>(params.hidden_size, cuda::kThreads), 0, stream,
                     static_cast<T*>(params.grad_rows), params.hidden_size, static_cast<const uint8_t*>(row_has_slot));
      }
    });
  });
}

}  // namespace zexpert
