// SPDX-License-Identifier: Apache-2.0
#include "zexpert/zero_expert_accumulate.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/element_types.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 2;

/// A block serves one run of columns of one token.
template <typename T, int kVector, bool kAccumulate>
__global__ void __launch_bounds__(kThreads)
    zero_expert_accumulate(const ZeroExpertAccumulateParams params, const int64_t blocks_per_row) {
  using Weight = typename Computed<T>::type;
  using Elements = Vector<T, kVector>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t token = blockIdx.x / blocks_per_row;
  const int64_t first = (blockIdx.x % blocks_per_row * kVectorsPerThread * kThreads + threadIdx.x) * kVector;
  const T* source = static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride;
  T* out = static_cast<T*>(params.out) + token * params.out_row_stride;
  const Weight weight = static_cast<const Weight*>(params.zero_weight)[token];
#pragma unroll
  for (int i = 0; i < kVectorsPerThread; ++i) {
    const int64_t column = first + static_cast<int64_t>(i) * kThreads * kVector;
    if (column >= params.hidden_size)
      break;
    Elements elements = *reinterpret_cast<const Elements*>(source + column);
    Elements sums;
    if (kAccumulate)
      sums = *reinterpret_cast<const Elements*>(out + column);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      Weight value = weight * Computed<T>::from(elements.values[v]);
      if (kAccumulate)
        value += Computed<T>::from(sums.values[v]);
      elements.values[v] = Computed<T>::to(value);
    }
    *reinterpret_cast<Elements*>(out + column) = elements;
  }
}

template <typename T, int kVector>
void launch_vectors(const ZeroExpertAccumulateParams& params, cudaStream_t stream) {
  constexpr int64_t kColumnsPerBlock = int64_t{kThreads} * kVectorsPerThread * kVector;
  const int64_t blocks_per_row = (params.hidden_size + kColumnsPerBlock - 1) / kColumnsPerBlock;
  const auto kernel =
      params.accumulate ? &zero_expert_accumulate<T, kVector, true> : &zero_expert_accumulate<T, kVector, false>;
  launch("zero_expert_accumulate", kernel, params.num_tokens * blocks_per_row, kThreads, 0, stream, params,
         blocks_per_row);
}

}  // namespace
}  // namespace cuda

void zero_expert_accumulate_cuda(const ZeroExpertAccumulateParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.hidden_size == 0) {
    return;
  }
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    using T = decltype(element);
    const bool fits = cuda::fits_vectors(params.hidden_states, params.hidden_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.out, params.out_row_stride, sizeof(T));
    cuda::visit_vector<T>(fits, params.hidden_size,
                          [&](auto vector) { cuda::launch_vectors<T, vector.value>(params, stream); });
  });
}

}  // namespace zexpert
