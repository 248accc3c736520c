// SPDX-License-Identifier: Apache-2.0
// dequantize_blockwise: the values of float8_e4m3fn matrices that have a scale for each block of 128 x 128.
#pragma once

#include <cstdint>

#include "zexpert/check_params.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"
#include "zexpert/scale_blocks.h"

namespace zexpert {

/// out = weight * scale_inv of the weight's block of kScaleBlock rows and columns, in float32 (float64 for float64
/// out), rounded once. Strides count elements. All pointers are to memory of the device that computes.
struct DequantizeBlockwiseParams {
  const void* weight = nullptr;  ///< [num_matrices, num_rows, num_columns] float8_e4m3fn; inner two contiguous
  /// [num_matrices, num_scale_blocks(num_rows), num_scale_blocks(num_columns)]; inner two contiguous
  const float* scale_inv = nullptr;
  void* out = nullptr;                          ///< [num_matrices, num_rows, num_columns], contiguous
  ScalarType data_type = ScalarType::kFloat32;  ///< of out
  int64_t num_matrices = 0;
  int64_t num_rows = 0;
  int64_t num_columns = 0;
  int64_t weight_matrix_stride = 0;
  int64_t scale_matrix_stride = 0;

  bool is_empty() const { return num_matrices == 0 || num_rows == 0 || num_columns == 0; }

  /// Throws Error for a negative size, a missing array or a type that is not floating.
  void validate() const {
    detail::check_sizes({{"num_matrices", num_matrices}, {"num_rows", num_rows}, {"num_columns", num_columns}});
    detail::check_floating(data_type);
    if (!is_empty()) {
      detail::check_pointers({{"weight", weight}, {"scale_inv", scale_inv}, {"out", out}});
    }
  }
};

/// Throws Error, before anything is written, for params that are not valid.
void dequantize_blockwise_cpu(const DequantizeBlockwiseParams& params);
void dequantize_blockwise_cuda(const DequantizeBlockwiseParams& params, cudaStream_t stream);

}  // namespace zexpert
