// SPDX-License-Identifier: Apache-2.0
#include "zexpert/dequantize_blockwise.h"

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/types.cuh"
#include "cuda/vector.cuh"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float float8_to_float(uint8_t bits) {
  return __half2float(__half(__nv_cvt_fp8_to_halfraw(bits, __NV_E4M3)));
}

/// A block per row. A vector is of one block of scales.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    dequantize_blockwise(const DequantizeBlockwiseParams params, const int64_t scales_per_row) {
  using A = typename Computed<T>::type;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t matrix = blockIdx.x / params.num_rows;
  const int64_t row = blockIdx.x % params.num_rows;
  const int64_t size = params.num_columns;
  const uint8_t* source =
      static_cast<const uint8_t*>(params.weight) + matrix * params.weight_matrix_stride + row * size;
  const float* scales = params.scale_inv + matrix * params.scale_matrix_stride + row / kScaleBlock * scales_per_row;
  T* target = static_cast<T*>(params.out) + int64_t{blockIdx.x} * size;
  for (int64_t i = int64_t{threadIdx.x} * kVector; i < size; i += int64_t{blockDim.x} * kVector) {
    const auto weights = *reinterpret_cast<const Vector<uint8_t, kVector>*>(source + i);
    const A scale = static_cast<A>(scales[i / kScaleBlock]);
    Vector<T, kVector> values;
#pragma unroll
    for (int v = 0; v < kVector; ++v)
      values.values[v] = Computed<T>::to(static_cast<A>(float8_to_float(weights.values[v])) * scale);
    *reinterpret_cast<Vector<T, kVector>*>(target + i) = values;
  }
}

}  // namespace
}  // namespace cuda

void dequantize_blockwise_cuda(const DequantizeBlockwiseParams& params, cudaStream_t stream) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    using T = decltype(element);
    const bool fits = cuda::fits_vectors(params.weight, params.num_columns, 1) &&
                      cuda::fits_vectors(params.weight, params.weight_matrix_stride, 1) &&
                      cuda::fits_vectors(params.out, params.num_columns, sizeof(T));
    cuda::visit_vector<T>(fits, params.num_columns, [&](auto vector) {
      cuda::launch("dequantize_blockwise", &cuda::dequantize_blockwise<T, vector.value>,
                   params.num_matrices * params.num_rows,
                   cuda::threads_for_row<vector.value>(params.num_columns, cuda::kThreads), 0, stream, params,
                   num_scale_blocks(params.num_columns));
    });
  });
}

}  // namespace zexpert
