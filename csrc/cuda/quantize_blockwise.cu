// SPDX-License-Identifier: Apache-2.0
#include "zexpert/quantize_blockwise.h"

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/types.cuh"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kLargestFloat8 = 448;
constexpr float kSmallestScale = 0x1p-126F;  // the smallest that is not subnormal
constexpr uint32_t kInfinityBits = 0x7f800000U;
constexpr uint8_t kNanCode = 0x7f;

/// A block of threads per block of weights.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_blockwise(const QuantizeBlockwiseParams params, const int64_t row_blocks, const int64_t column_blocks) {
  constexpr int kRowsAtOnce = kThreads / static_cast<int>(kScaleBlock);
  __shared__ uint32_t largest_bits;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t matrix = blockIdx.x / (row_blocks * column_blocks);
  const int64_t first_row = blockIdx.x / column_blocks % row_blocks * kScaleBlock + threadIdx.x / kScaleBlock;
  const int64_t end_row = (blockIdx.x / column_blocks % row_blocks + 1) * kScaleBlock;
  const int64_t last_row = end_row < params.num_rows ? end_row : params.num_rows;
  const int64_t column = blockIdx.x % column_blocks * kScaleBlock + threadIdx.x % kScaleBlock;
  const bool has_column = column < params.num_columns;
  const T* source = static_cast<const T*>(params.weight) + matrix * params.weight_matrix_stride + column;
  const auto weight = [&](int64_t row) {
    return static_cast<float>(Computed<T>::from(source[row * params.num_columns]));
  };

  // The largest magnitude. As integers, the bits of magnitudes have the order of their values, and NaN is the largest.
  if (threadIdx.x == 0)
    largest_bits = 0;
  __syncthreads();
  uint32_t bits = 0;
  if (has_column) {
    for (int64_t row = first_row; row < last_row; row += kRowsAtOnce) {
      const uint32_t magnitude = __float_as_uint(weight(row)) & 0x7fffffffU;
      bits = magnitude > bits ? magnitude : bits;
    }
  }
  atomicMax(&largest_bits, bits);
  __syncthreads();
  const bool is_finite = largest_bits < kInfinityBits;
  const float quotient = __fdiv_rn(__uint_as_float(largest_bits), kLargestFloat8);
  float scale = quotient > kSmallestScale ? quotient : kSmallestScale;
  scale = largest_bits == 0 ? 1.0F : scale;
  scale = is_finite ? scale : __uint_as_float(0x7fc00000U);

  // Write
  if (threadIdx.x == 0)
    params.scale_inv[blockIdx.x] = scale;
  if (has_column) {
    uint8_t* target = static_cast<uint8_t*>(params.out) + matrix * params.num_rows * params.num_columns + column;
    for (int64_t row = first_row; row < last_row; row += kRowsAtOnce) {
      const uint8_t code = __nv_cvt_float_to_fp8(__fdiv_rn(weight(row), scale), __NV_SATFINITE, __NV_E4M3);
      target[row * params.num_columns] = is_finite ? code : kNanCode;
    }
  }
}

}  // namespace
}  // namespace cuda

void quantize_blockwise_cuda(const QuantizeBlockwiseParams& params, cudaStream_t stream) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  const int64_t row_blocks = num_scale_blocks(params.num_rows);
  const int64_t column_blocks = num_scale_blocks(params.num_columns);
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    using T = decltype(element);
    cuda::launch("quantize_blockwise", &cuda::quantize_blockwise<T>, params.num_matrices * row_blocks * column_blocks,
                 cuda::kThreads, 0, stream, params, row_blocks, column_blocks);
  });
}

}  // namespace zexpert
