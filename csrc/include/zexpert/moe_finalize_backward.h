// SPDX-License-Identifier: Apache-2.0
// moe_finalize_backward: gradients of the layer's epilogue, one pass over the experts' rows.
#pragma once

#include <cstdint>

#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// For out[t] = sum_k topk_weights[t, k] * rows[slot_rows[t, k]] + zero_weight[t] * hidden_states[t]:
///   grad_rows[slot_rows[t, k]] = topk_weights[t, k] * grad_out[t]
///   grad_topk_weights[t, k]    = <grad_out[t], rows[slot_rows[t, k]]>, 0 for a slot with row -1
///   grad_hidden_states[t]      = zero_weight[t] * grad_out[t]
///   grad_zero_weight[t]        = <grad_out[t], hidden_states[t]>, one dot product for all identity slots of the token
/// Computed in float32 (float64 for float64 data) and rounded once. Rows that no slot names are not read, and their
/// gradient is 0.
/// Strides count elements.
struct MoeFinalizeBackwardParams {
  const void* grad_out = nullptr;       ///< [num_tokens, hidden_size]; unit inner stride
  const void* rows = nullptr;           ///< [num_rows, hidden_size]; unit inner stride
  const int32_t* slot_rows = nullptr;   ///< [num_tokens, top_k]; contiguous; in [-1, num_rows), no row twice
  const void* topk_weights = nullptr;   ///< [num_tokens, top_k]; weight type; contiguous
  const void* hidden_states = nullptr;  ///< [num_tokens, hidden_size]; unit inner stride
  const void* zero_weight = nullptr;    ///< [num_tokens]; weight type; contiguous
  void* grad_rows = nullptr;            ///< [num_rows, hidden_size]; contiguous
  void* grad_topk_weights = nullptr;    ///< [num_tokens, top_k]; weight type; contiguous
  void* grad_hidden_states = nullptr;   ///< [num_tokens, hidden_size]; contiguous
  void* grad_zero_weight = nullptr;     ///< [num_tokens]; weight type; contiguous
  /// Type of grad_out, rows, hidden_states and their gradients. The weight type is float32, float64 for float64.
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_rows = 0;
  int64_t num_tokens = 0;
  int64_t top_k = 0;
  int64_t hidden_size = 0;
  int64_t grad_out_row_stride = 0;
  int64_t rows_row_stride = 0;
  int64_t hidden_row_stride = 0;
};

/// Throws Error, before anything is written, if an entry of slot_rows lies outside [-1, num_rows) or two slots name
/// one row.
void moe_finalize_backward_cpu(const MoeFinalizeBackwardParams& params);

/// The same on the current CUDA device; pointers are to its memory. A slot whose row is out of range has gradient 0,
/// and no two slots may name one row. `row_has_slot` is [num_rows] to work in.
void moe_finalize_backward_cuda(const MoeFinalizeBackwardParams& params, uint8_t* row_has_slot, cudaStream_t stream);

}  // namespace zexpert
