// SPDX-License-Identifier: Apache-2.0
// moe_permute: token rows copied into the plan's order, and its gradient.
#pragma once

#include <cstdint>

#include "zexpert/check_params.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/moe_finalize.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// rows[r] = hidden_states[row_slots[r] / top_k] for every row r that does work.
/// Strides count elements. All pointers are to memory of the device that computes.
struct MoePermuteParams {
  const void* hidden_states = nullptr;  ///< [num_tokens, hidden_size]; unit inner stride
  const int32_t* row_slots = nullptr;   ///< [num_rows]; entries of rows that do work in [0, num_tokens * top_k)
  /// Null, or [num_tokens, top_k]: the inverse of row_slots, the slot's row or -1. The kernel reads one of the two:
  /// with slot_rows a GPU reads every token once instead of once for each row.
  const int32_t* slot_rows = nullptr;
  void* rows = nullptr;  ///< [num_rows, hidden_size]; type of hidden_states, contiguous
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_rows = 0;
  int64_t num_tokens = 0;
  int64_t top_k = 1;
  int64_t hidden_size = 0;
  int64_t hidden_row_stride = 0;
  const int32_t* last_offset = nullptr;  ///< null: all rows do work; else only rows below *last_offset do

  bool is_empty() const { return num_rows == 0 || hidden_size == 0; }

  /// Throws Error for a negative size, a missing array or a type that is not floating.
  void validate() const {
    detail::check_sizes(
        {{"num_rows", num_rows}, {"num_tokens", num_tokens}, {"top_k", top_k}, {"hidden_size", hidden_size}});
    detail::check_floating(data_type);
    if (!is_empty()) {
      detail::check_pointers({{"row_slots", row_slots}, {"hidden_states", hidden_states}, {"rows", rows}});
    }
  }
};

/// Rows that do no work are not written. Throws Error, before anything is written, for params that are not valid; on
/// the CPU also if *last_offset is not between 0 and num_rows, or an entry of row_slots is out of range. CUDA does not
/// write a row with such an entry.
void moe_permute_cpu(const MoePermuteParams& params);
void moe_permute_cuda(const MoePermuteParams& params, cudaStream_t stream);

/// grad_hidden_states[t] = sum of grad_rows[r] over the rows r that do work with row_slots[r] / top_k == t, in slot
/// order, rows of one slot in ascending order; 0 for a token without rows. Accumulated in float32 (float64 for float64
/// data) and rounded once. Rows that do no work are not read.
/// Strides count elements. All pointers are to memory of the device that computes.
struct MoePermuteBackwardParams {
  const void* grad_rows = nullptr;     ///< [num_rows, hidden_size]; unit inner stride
  const int32_t* row_slots = nullptr;  ///< [num_rows]; entries of rows that do work in [0, num_tokens * top_k)
  const int32_t* slot_rows = nullptr;  ///< null, or [num_tokens, top_k]: the inverse of row_slots, read in its place
  void* grad_hidden_states = nullptr;  ///< [num_tokens, hidden_size]; type of grad_rows, contiguous
  void* workspace =
      nullptr;  ///< moe_permute_backward_<device>_workspace_bytes(params), aligned to 4; null if that is 0
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_rows = 0;
  int64_t num_tokens = 0;
  int64_t top_k = 1;
  int64_t hidden_size = 0;
  int64_t grad_rows_row_stride = 0;
  const int32_t* last_offset = nullptr;  ///< null: all rows do work; else only rows below *last_offset do

  bool is_empty() const { return num_tokens == 0 || hidden_size == 0; }
  bool needs_workspace() const { return slot_rows == nullptr && !is_empty(); }

  void validate() const;

  /// The sum as moe_finalize names it, over slot_rows and with weights of 1.
  MoeFinalizeParams as_moe_finalize() const {
    MoeFinalizeParams params;
    params.rows = grad_rows;
    params.slot_rows = slot_rows;
    params.out = grad_hidden_states;
    params.data_type = data_type;
    params.num_rows = num_rows;
    params.num_tokens = num_tokens;
    params.top_k = top_k;
    params.hidden_size = hidden_size;
    params.rows_row_stride = grad_rows_row_stride;
    params.out_row_stride = hidden_size;
    return params;
  }
};

/// Bytes of scratch that the caller provides, in memory of the device: without slot_rows a number for each slot, one
/// for all of them, and one for each row.
inline int64_t moe_permute_backward_cpu_workspace_bytes(const MoePermuteBackwardParams& params) {
  const int64_t num_slots = params.num_tokens * params.top_k;
  return params.needs_workspace() ? static_cast<int64_t>(sizeof(int32_t)) * (num_slots + 1 + params.num_rows) : 0;
}
inline int64_t moe_permute_backward_cuda_workspace_bytes(const MoePermuteBackwardParams& params) {
  return moe_permute_backward_cpu_workspace_bytes(params);
}

/// Throws Error for a negative size, a missing array or a type that is not floating.
inline void MoePermuteBackwardParams::validate() const {
  detail::check_sizes(
      {{"num_rows", num_rows}, {"num_tokens", num_tokens}, {"top_k", top_k}, {"hidden_size", hidden_size}});
  detail::check_floating(data_type);
  if (is_empty()) {
    return;
  }
  if (num_rows > 0) {
    detail::check_pointers({{"row_slots", row_slots}, {"grad_rows", grad_rows}});
  }
  detail::check_pointers({{"grad_hidden_states", grad_hidden_states}});
  if (needs_workspace()) {
    detail::check_pointers({{"workspace", workspace}});
  }
}

/// Throws Error, before anything is written, as the forward does; on the CPU also if an entry of slot_rows is neither
/// -1 nor a row that does work. CUDA leaves out a row or slot with an entry that is out of range.
void moe_permute_backward_cpu(const MoePermuteBackwardParams& params);
void moe_permute_backward_cuda(const MoePermuteBackwardParams& params, cudaStream_t stream);

}  // namespace zexpert
