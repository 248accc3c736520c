// SPDX-License-Identifier: Apache-2.0
// quantize_blockwise: matrices as float8_e4m3fn with a scale for each block of 128 x 128.
#pragma once

#include <cstdint>

#include "zexpert/check_params.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"
#include "zexpert/scale_blocks.h"

namespace zexpert {

/// For every block B of kScaleBlock rows and columns of a matrix (the last ones may be smaller):
///   scale_inv[B] = max |weight[B]| / 448, at least 2^-126; 1 for a block of zeros
///   out[B]       = weight[B] / scale_inv[B], rounded to the nearest float8_e4m3fn, ties to even
/// in float32. 448 is the largest number of the type. float64 weights are rounded to float32 first.
/// Strides count elements. All pointers are to memory of the device that computes.
struct QuantizeBlockwiseParams {
  const void* weight = nullptr;  ///< [num_matrices, num_rows, num_columns]; inner two contiguous
  void* out = nullptr;           ///< [num_matrices, num_rows, num_columns] float8_e4m3fn, contiguous
  float* scale_inv =
      nullptr;  ///< [num_matrices, num_scale_blocks(num_rows), num_scale_blocks(num_columns)], contiguous
  ScalarType data_type = ScalarType::kFloat32;  ///< of weight
  int64_t num_matrices = 0;
  int64_t num_rows = 0;
  int64_t num_columns = 0;
  int64_t weight_matrix_stride = 0;

  bool is_empty() const { return num_matrices == 0 || num_rows == 0 || num_columns == 0; }

  /// Throws Error for a negative size, a missing array or a type that is not floating.
  void validate() const {
    detail::check_sizes({{"num_matrices", num_matrices}, {"num_rows", num_rows}, {"num_columns", num_columns}});
    detail::check_floating(data_type);
    if (!is_empty()) {
      detail::check_pointers({{"weight", weight}, {"out", out}, {"scale_inv", scale_inv}});
    }
  }
};

/// Throws Error, before anything is written, for params that are not valid and for a weight that is NaN or infinite.
void quantize_blockwise_cpu(const QuantizeBlockwiseParams& params);

/// Throws Error for params that are not valid. A block with a weight that is NaN or infinite becomes NaN, and so does
/// its scale: the host does not wait for the device to look.
void quantize_blockwise_cuda(const QuantizeBlockwiseParams& params, cudaStream_t stream);

}  // namespace zexpert
