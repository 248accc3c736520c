// SPDX-License-Identifier: Apache-2.0
// moe_permute for tensors on any device: checks, output, parameters.
#pragma once

#include <optional>

#include "torch/checks.h"
#include "torch/tensor.h"
#include "zexpert/moe_permute.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Calls launch(params, expert_offsets) unless there is nothing to copy. params.num_rows is the number of slots: what
/// the last of the offsets, which may lie in device memory, says is left to the launch.
template <typename Launch>
Tensor moe_permute(const Tensor& hidden_states, const Tensor& row_slots, const Tensor& expert_offsets, int64_t top_k,
                   const std::optional<Tensor>& slot_rows, const Launch& launch) {
  check_device(row_slots, "row_slots", hidden_states, "hidden_states");
  check_device(expert_offsets, "expert_offsets", hidden_states, "hidden_states");
  if (slot_rows) {
    check_device(*slot_rows, "slot_rows", hidden_states, "hidden_states");
  }
  check_floating(hidden_states, "hidden_states");
  check_dtype(row_slots, "row_slots", DType::Int);
  check_dtype(expert_offsets, "expert_offsets", DType::Int);
  if (slot_rows) {
    check_dtype(*slot_rows, "slot_rows", DType::Int);
  }
  check_dims(hidden_states, "hidden_states", 2, "[tokens, hidden_size]");
  check_dims(row_slots, "row_slots", 1, "[rows]");
  check_expert_offsets_dims(expert_offsets);
  ZEXPERT_CHECK(top_k >= 1, "top_k must be at least 1, got ", top_k);
  const int64_t num_tokens = hidden_states.size(0);
  const int64_t hidden_size = hidden_states.size(1);
  const int64_t num_slots = row_slots.size(0);
  check_row_slots_size(row_slots, num_tokens, top_k);
  if (slot_rows) {
    check_shape(*slot_rows, "slot_rows", {num_tokens, top_k}, "[tokens, top_k]");
  }

  const Tensor rows = empty({num_slots, hidden_size}, hidden_states.scalar_type(), hidden_states);
  if (rows.numel() > 0) {
    const Tensor tokens = with_unit_inner_stride(hidden_states);
    const Tensor slots = as_contiguous(row_slots);
    const Tensor inverse = slot_rows ? as_contiguous(*slot_rows) : slots;
    MoePermuteParams params;
    params.hidden_states = tokens.const_data_ptr();
    params.row_slots = slots.const_data_ptr<int32_t>();
    params.slot_rows = slot_rows ? inverse.const_data_ptr<int32_t>() : nullptr;
    params.rows = rows.mutable_data_ptr();
    params.data_type = element_type(tokens);
    params.num_rows = num_slots;
    params.num_tokens = num_tokens;
    params.top_k = top_k;
    params.hidden_size = hidden_size;
    params.hidden_row_stride = tokens.stride(0);
    launch(params, as_contiguous(expert_offsets));
  }
  return rows;
}

HIDDEN_NAMESPACE_END(zexpert, ops)
