// SPDX-License-Identifier: Apache-2.0
// moe_finalize: the layer's epilogue, one pass over the experts' rows, and its gradients.
#pragma once

#include <cstdint>

#include "zexpert/check_params.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/error.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// out[t] = sum_k topk_weights[t, k] * rows[slot_rows[t, k]]      (slots with row -1 skipped, in slot order)
///        + zero_weight[t] * hidden_states[t]                     (if zero_weight is not null)
///        + sum_c constant_weight[t, c] * constant_vectors[c]     (if num_constant_experts > 0)
///        + residual[t]                                           (if residual is not null)
/// Accumulated in float32 (float64 for float64 data) in that order and rounded once. The zero part without slots and
/// constants is one fused multiply-add of zero_weight, hidden_states and residual.
/// Strides count elements. All pointers are to memory of the device that computes.
struct MoeFinalizeParams {
  const void* rows = nullptr;              ///< [num_rows, hidden_size]; unit inner stride
  const int32_t* slot_rows = nullptr;      ///< [num_tokens, top_k]; contiguous; every entry in [-1, num_rows)
  const void* topk_weights = nullptr;      ///< [num_tokens, top_k]; weight type; contiguous; null: every weight is 1
  const void* hidden_states = nullptr;     ///< [num_tokens, hidden_size]; unit inner stride; null without zero_weight
  const void* zero_weight = nullptr;       ///< [num_tokens]; weight type; contiguous; null: no zero part
  const void* residual = nullptr;          ///< [num_tokens, hidden_size] or null; unit inner stride
  const void* constant_weight = nullptr;   ///< [num_tokens, num_constant_experts]; weight type; contiguous
  const void* constant_vectors = nullptr;  ///< [num_constant_experts, hidden_size]; unit inner stride
  void* out = nullptr;                     ///< [num_tokens, hidden_size]; may be hidden_states or residual itself
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
  int64_t out_row_stride = 0;  ///< at least hidden_size

  bool is_empty() const { return num_tokens == 0 || hidden_size == 0; }
  bool is_zero_part_alone() const { return top_k == 0 && num_constant_experts == 0 && zero_weight != nullptr; }

  /// Throws Error for a negative size, a missing array, a type that is not floating or rows of `out` that overlap.
  void validate() const {
    detail::check_sizes({{"num_rows", num_rows},
                         {"num_tokens", num_tokens},
                         {"top_k", top_k},
                         {"num_constant_experts", num_constant_experts},
                         {"hidden_size", hidden_size}});
    detail::check_floating(data_type);
    if (num_tokens * top_k > 0) {
      detail::check_pointers({{"slot_rows", slot_rows}});
    }
    if (is_empty()) {
      return;
    }
    if (zero_weight != nullptr) {
      detail::check_pointers({{"hidden_states", hidden_states}});
    }
    detail::check_pointers({{"out", out}});
    if (num_rows > 0 && top_k > 0) {
      detail::check_pointers({{"rows", rows}});
    }
    if (num_constant_experts > 0) {
      detail::check_pointers({{"constant_weight", constant_weight}, {"constant_vectors", constant_vectors}});
    }
    ZEXPERT_CHECK(num_tokens == 1 || out_row_stride >= hidden_size, "out_row_stride must be at least hidden_size (",
                  hidden_size, "), got ", out_row_stride);
  }
};

/// Throws Error, before anything is written, for params that are not valid; on the CPU also if an entry of slot_rows is
/// outside [-1, num_rows). CUDA skips a slot with such an entry.
void moe_finalize_cpu(const MoeFinalizeParams& params);
void moe_finalize_cuda(const MoeFinalizeParams& params, cudaStream_t stream);

/// For out[t] = sum_k topk_weights[t, k] * rows[slot_rows[t, k]] + zero_weight[t] * hidden_states[t]:
///   grad_rows[slot_rows[t, k]] = topk_weights[t, k] * grad_out[t]
///   grad_topk_weights[t, k]    = <grad_out[t], rows[slot_rows[t, k]]>, 0 for a slot with row -1
///   grad_hidden_states[t]      = zero_weight[t] * grad_out[t]
///   grad_zero_weight[t]        = <grad_out[t], hidden_states[t]>, one dot product for all identity slots of the token
/// Computed in float32 (float64 for float64 data) and rounded once. Rows that no slot names are not read, and their
/// gradient is 0.
/// Strides count elements. All pointers are to memory of the device that computes.
struct MoeFinalizeBackwardParams {
  const void* grad_out = nullptr;       ///< [num_tokens, hidden_size]; unit inner stride
  const void* rows = nullptr;           ///< [num_rows, hidden_size]; unit inner stride
  const int32_t* slot_rows = nullptr;   ///< [num_tokens, top_k]; contiguous; in [-1, num_rows), no row twice
  const void* topk_weights = nullptr;   ///< [num_tokens, top_k]; weight type; contiguous
  const void* hidden_states = nullptr;  ///< [num_tokens, hidden_size]; unit inner stride
  const void* zero_weight = nullptr;    ///< [num_tokens]; weight type; contiguous; null without grad_hidden_states
  void* grad_rows = nullptr;            ///< [num_rows, hidden_size]; contiguous
  void* grad_topk_weights = nullptr;    ///< [num_tokens, top_k]; weight type; contiguous
  void* grad_hidden_states = nullptr;   ///< [num_tokens, hidden_size]; contiguous; null: not computed
  void* grad_zero_weight = nullptr;     ///< [num_tokens]; weight type; contiguous
  void* workspace = nullptr;            ///< moe_finalize_backward_<device>_workspace_bytes(params); null if that is 0
  /// Type of grad_out, rows, hidden_states and their gradients. The weight type is float32, float64 for float64.
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_rows = 0;
  int64_t num_tokens = 0;
  int64_t top_k = 0;
  int64_t hidden_size = 0;
  int64_t grad_out_row_stride = 0;
  int64_t rows_row_stride = 0;
  int64_t hidden_row_stride = 0;

  /// Without tokens, rows still have gradients: zeros.
  bool is_empty() const { return num_tokens == 0 && num_rows == 0; }

  void validate() const;
};

/// Bytes of scratch that the caller provides, in memory of the device: a byte for each row.
inline int64_t moe_finalize_backward_cpu_workspace_bytes(const MoeFinalizeBackwardParams& params) {
  return params.num_rows;
}
inline int64_t moe_finalize_backward_cuda_workspace_bytes(const MoeFinalizeBackwardParams& params) {
  return params.num_rows;
}

/// Throws Error for a negative size, a missing array or a type that is not floating.
inline void MoeFinalizeBackwardParams::validate() const {
  detail::check_sizes(
      {{"num_rows", num_rows}, {"num_tokens", num_tokens}, {"top_k", top_k}, {"hidden_size", hidden_size}});
  detail::check_floating(data_type);
  if (num_tokens * top_k > 0) {
    detail::check_pointers(
        {{"slot_rows", slot_rows}, {"topk_weights", topk_weights}, {"grad_topk_weights", grad_topk_weights}});
  }
  if (num_tokens > 0) {
    detail::check_pointers({{"grad_zero_weight", grad_zero_weight}});
    if (hidden_size > 0) {
      detail::check_pointers({{"grad_out", grad_out}, {"hidden_states", hidden_states}});
    }
    if (grad_hidden_states != nullptr) {
      detail::check_pointers({{"zero_weight", zero_weight}});
    }
  }
  if (num_rows * hidden_size > 0) {
    detail::check_pointers({{"rows", rows}, {"grad_rows", grad_rows}});
  }
  if (num_rows > 0) {
    detail::check_pointers({{"workspace", workspace}});
  }
}

/// Throws Error, before a gradient is written, for params that are not valid; on the CPU also if an entry of slot_rows
/// is outside [-1, num_rows) or two slots name one row. On CUDA a slot with such an entry has gradient 0, and no two
/// slots may name one row.
void moe_finalize_backward_cpu(const MoeFinalizeBackwardParams& params);
void moe_finalize_backward_cuda(const MoeFinalizeBackwardParams& params, cudaStream_t stream);

}  // namespace zexpert
