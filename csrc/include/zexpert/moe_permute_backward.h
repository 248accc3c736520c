// SPDX-License-Identifier: Apache-2.0
// moe_permute_backward: the gradients of a token's rows summed.
#pragma once

#include <cstdint>

#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// grad_hidden_states[t] = sum of grad_rows[r] over the rows r below num_rows with row_slots[r] / top_k == t, in slot
/// order; 0 for a token without rows. Accumulated in float32 (float64 for float64 data) and rounded once. Rows from
/// num_rows on are not read.
/// Strides count elements.
struct MoePermuteBackwardParams {
  const void* grad_rows = nullptr;     ///< [at least num_rows, hidden_size]; unit inner stride
  const int32_t* row_slots = nullptr;  ///< [at least num_rows]; every entry in [0, num_tokens * top_k)
  void* grad_hidden_states = nullptr;  ///< [num_tokens, hidden_size]; type of grad_rows, contiguous
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_rows = 0;  ///< rows that do work: the plan's last offset
  int64_t num_tokens = 0;
  int64_t top_k = 1;
  int64_t hidden_size = 0;
  int64_t grad_rows_row_stride = 0;
};

/// Throws Error, before anything is written, if an entry of row_slots is out of range.
void moe_permute_backward_cpu(const MoePermuteBackwardParams& params);

/// The same on the current CUDA device; pointers are to its memory. Rows from *last_offset on are not read, nor are
/// rows whose slot is out of range; no slot may have two rows. `slot_rows` is [num_tokens * top_k] to work in.
void moe_permute_backward_cuda(const MoePermuteBackwardParams& params, const int32_t* last_offset, int32_t* slot_rows,
                               cudaStream_t stream);

}  // namespace zexpert
