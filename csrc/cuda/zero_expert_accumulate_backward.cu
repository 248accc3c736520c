// SPDX-License-Identifier: Apache-2.0
#include "zexpert/zero_expert_accumulate_backward.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/element_types.cuh"
#include "cuda/launch.cuh"
#include "cuda/scale_and_dot.cuh"
#include "cuda/vector.cuh"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kThreads = 256;

/// A block per token.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    zero_expert_accumulate_backward(const ZeroExpertAccumulateBackwardParams params) {
  using A = typename Computed<T>::type;
  __shared__ A scratch[kThreads / kWarpSize];
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t token = blockIdx.x;
  const A part = scale_and_dot<T, kVector>(
      static_cast<const T*>(params.grad_out) + token * params.grad_out_row_stride,
      static_cast<const A*>(params.zero_weight)[token],
      static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride, params.hidden_size,
      static_cast<T*>(params.grad_hidden_states) + token * params.hidden_size, static_cast<int>(threadIdx.x),
      static_cast<int>(blockDim.x));
  const A dot = block_sum(part, scratch);
  if (threadIdx.x == 0)
    static_cast<A*>(params.grad_zero_weight)[token] = dot;
}

}  // namespace
}  // namespace cuda

void zero_expert_accumulate_backward_cuda(const ZeroExpertAccumulateBackwardParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0) {
    return;
  }
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    using T = decltype(element);
    const bool fits = cuda::fits_vectors(params.grad_out, params.grad_out_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.hidden_states, params.hidden_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.grad_hidden_states, params.hidden_size, sizeof(T));
    cuda::visit_vector<T>(fits, params.hidden_size, [&](auto vector) {
      cuda::launch("zero_expert_accumulate_backward", &cuda::zero_expert_accumulate_backward<T, vector.value>,
                   params.num_tokens, cuda::threads_for_row<vector.value>(params.hidden_size, cuda::kThreads), 0,
                   stream, params);
    });
  });
}

}  // namespace zexpert
