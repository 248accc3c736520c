#include "zexpert/zero_expert_accumulate.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/element_types.cuh"
#include "cuda/launch.cuh"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 2;
constexpr int64_t kVectorBytes = 16;

/// kVector elements moved by one access.
template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Vector {
  T values[kVector];
};

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

template <typename T>
void launch_type(const ZeroExpertAccumulateParams& params, cudaStream_t stream) {
  constexpr int kVector = static_cast<int>(kVectorBytes / sizeof(T));
  const auto fits = [](const void* data, int64_t row_stride) {
    return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0 && row_stride % kVector == 0;
  };
  if (params.hidden_size % kVector == 0 && fits(params.hidden_states, params.hidden_row_stride) &&
      fits(params.out, params.out_row_stride)) {
    launch_vectors<T, kVector>(params, stream);
  } else {
    launch_vectors<T, 1>(params, stream);
  }
}

}  // namespace
}  // namespace cuda

void zero_expert_accumulate_cuda(const ZeroExpertAccumulateParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.hidden_size == 0) {
    return;
  }
  switch (params.data_type) {
    case ScalarType::kFloat64: return cuda::launch_type<double>(params, stream);
    case ScalarType::kBFloat16: return cuda::launch_type<__nv_bfloat16>(params, stream);
    case ScalarType::kFloat16: return cuda::launch_type<__half>(params, stream);
    default: return cuda::launch_type<float>(params, stream);
  }
}

}  // namespace zexpert
