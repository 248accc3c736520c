// SPDX-License-Identifier: Apache-2.0
// moe_permute: token rows copied into the plan's order.
#pragma once

#include <cstdint>

#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// rows[r] = hidden_states[row_slots[r] / top_k] for r below num_rows; later rows are left untouched.
/// Strides count elements.
struct MoePermuteParams {
  const void* hidden_states = nullptr;  ///< [num_tokens, hidden_size]; unit inner stride
  const int32_t* row_slots = nullptr;   ///< [at least num_rows]; every entry in [0, num_tokens * top_k)
  /// [num_tokens, top_k] or null: the plan's inverse of row_slots, -1 or a row. With it a GPU reads every token once
  /// instead of once per row; the CPU does not look at it.
  const int32_t* slot_rows = nullptr;
  void* rows = nullptr;  ///< [at least num_rows, hidden_size]; type of hidden_states, contiguous
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_rows = 0;  ///< rows that do work: the plan's last offset
  int64_t num_tokens = 0;
  int64_t top_k = 1;
  int64_t hidden_size = 0;
  int64_t hidden_row_stride = 0;
};

/// Throws Error, before anything is written, if an entry of row_slots is out of range.
void moe_permute_cpu(const MoePermuteParams& params);

/// The same on the current CUDA device; pointers are to its memory, `last_offset` too: rows from *last_offset on are
/// left untouched, as are rows whose slot is out of range. With slot_rows it alone is read: entries that are no row are
/// skipped.
void moe_permute_cuda(const MoePermuteParams& params, const int32_t* last_offset, cudaStream_t stream);

}  // namespace zexpert
