// SPDX-License-Identifier: Apache-2.0
// moe_finalize: the layer's epilogue, one pass over the experts' rows.
#pragma once

#include <cstdint>

#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// out[t] = sum_k topk_weights[t, k] * rows[slot_rows[t, k]]      (slots with row -1 skipped, in slot order)
///        + zero_weight[t] * hidden_states[t]
///        + sum_c constant_weight[t, c] * constant_vectors[c]     (if num_constant_experts > 0)
///        + residual[t]                                           (if residual is not null)
/// Accumulated in float32 (float64 for float64 data) in that order and rounded once.
/// Strides count elements.
struct MoeFinalizeParams {
  const void* rows = nullptr;              ///< [num_rows, hidden_size]; unit inner stride
  const int32_t* slot_rows = nullptr;      ///< [num_tokens, top_k]; contiguous; every entry in [-1, num_rows)
  const void* topk_weights = nullptr;      ///< [num_tokens, top_k]; weight type; contiguous
  const void* hidden_states = nullptr;     ///< [num_tokens, hidden_size]; unit inner stride
  const void* zero_weight = nullptr;       ///< [num_tokens]; weight type; contiguous
  const void* residual = nullptr;          ///< [num_tokens, hidden_size] or null; unit inner stride
  const void* constant_weight = nullptr;   ///< [num_tokens, num_constant_experts]; weight type; contiguous
  const void* constant_vectors = nullptr;  ///< [num_constant_experts, hidden_size]; unit inner stride
  void* out = nullptr;                     ///< [num_tokens, hidden_size]; contiguous
  /// Type of rows, hidden_states, residual, constant_vectors and out. The weight type is float32, float64 for float64.
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_rows = 0;
  int64_t num_tokens = 0;
  int64_t top_k = 0;
  int64_t num_constant_experts = 0;
  int64_t hidden_size = 0;
  int64_t rows_row_stride = 0;
  int64_t hidden_row_stride = 0;
  int64_t residual_row_stride = 0;
  int64_t constant_row_stride = 0;
};

/// Throws Error, before anything is written, if an entry of slot_rows lies outside [-1, num_rows).
void moe_finalize_cpu(const MoeFinalizeParams& params);

/// The same on the current CUDA device; pointers are to its memory. A slot whose row is out of range is skipped.
void moe_finalize_cuda(const MoeFinalizeParams& params, cudaStream_t stream);

}  // namespace zexpert
