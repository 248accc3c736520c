// SPDX-License-Identifier: Apache-2.0
// Checks of an operator's parameters, before anything is read or written.
#pragma once

#include <cstdint>
#include <limits>

#include "cpu/expert_offsets.h"
#include "cpu/index_range.h"
#include "zexpert/check_params.h"
#include "zexpert/error.h"
#include "zexpert/scale_blocks.h"

namespace zexpert {

using detail::check_pointers;
using detail::check_sizes;

/// How many of the rows do work, read from host memory; `last_offset` null: all do.
inline int64_t num_working_rows(const int32_t* last_offset, int64_t num_rows) {
  if (last_offset == nullptr) {
    return num_rows;
  }
  ZEXPERT_CHECK(*last_offset >= 0 && *last_offset <= num_rows,
                "expert_offsets must end between 0 and the number of rows (", num_rows, "), got ", *last_offset);
  return *last_offset;
}

/// Throws Error unless the first num_rows entries of row_slots, those of rows that do work, are slots.
inline void check_row_slots(const int32_t* row_slots, int64_t num_rows, int64_t num_slots) {
  const int64_t bad = find_out_of_range(row_slots, num_rows, 0, num_slots);
  ZEXPERT_CHECK(bad < 0, "row_slots must be in [0, ", num_slots, ") below the last offset, got ", row_slots[bad]);
}

/// Throws Error unless the scales of experts that have rows are finite and not negative.
inline void check_scales(const char* name, const float* scales, int64_t expert_stride, int64_t num_scales,
                         const int32_t* expert_offsets, int64_t num_experts) {
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    if (expert_offsets[expert] == expert_offsets[expert + 1]) {
      continue;
    }
    const float* scales_of_expert = scales + expert * expert_stride;
    for (int64_t i = 0; i < num_scales; ++i) {
      const float scale = scales_of_expert[i];
      ZEXPERT_CHECK(scale >= 0 && scale <= std::numeric_limits<float>::max(), name,
                    " must be finite and not negative, got ", scale);
    }
  }
}

/// Throws Error unless the offsets of grouped_mlp, its row_slots and its scales, if it has them, are in range.
template <typename Params>
void check_expert_rows(const Params& params) {
  check_expert_offsets(params.expert_offsets, params.num_experts, params.num_rows);
  if (params.row_slots != nullptr) {
    check_row_slots(params.row_slots, params.expert_offsets[params.num_experts], params.num_tokens * params.top_k);
  }
  if (params.has_fp8_weights()) {
    const int64_t hidden_blocks = num_scale_blocks(params.hidden_size);
    const int64_t inner_blocks = num_scale_blocks(params.intermediate_size);
    check_scales("w13_scale_inv", params.w13_scale_inv, params.w13_scale_expert_stride,
                 2 * inner_blocks * hidden_blocks, params.expert_offsets, params.num_experts);
    check_scales("w2_scale_inv", params.w2_scale_inv, params.w2_scale_expert_stride, hidden_blocks * inner_blocks,
                 params.expert_offsets, params.num_experts);
  }
}

}  // namespace zexpert
