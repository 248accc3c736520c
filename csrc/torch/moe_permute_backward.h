// SPDX-License-Identifier: Apache-2.0
// moe_permute_backward for tensors on any device: checks, output, parameters.
#pragma once

#include "torch/checks.h"
#include "torch/tensor.h"
#include "zexpert/moe_permute_backward.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Calls launch(params, expert_offsets) unless the result has no elements. params.num_rows is the number of slots: what
/// the last of the offsets, which may lie in device memory, says is left to the launch.
template <typename Launch>
Tensor moe_permute_backward(const Tensor& grad_rows, const Tensor& row_slots, const Tensor& expert_offsets,
                            int64_t num_tokens, int64_t top_k, const Launch& launch) {
  check_device(row_slots, "row_slots", grad_rows, "grad_rows");
  check_device(expert_offsets, "expert_offsets", grad_rows, "grad_rows");
  check_floating(grad_rows, "grad_rows");
  check_dtype(row_slots, "row_slots", DType::Int);
  check_dtype(expert_offsets, "expert_offsets", DType::Int);
  check_dims(grad_rows, "grad_rows", 2, "[rows, hidden_size]");
  check_dims(row_slots, "row_slots", 1, "[rows]");
  check_expert_offsets_dims(expert_offsets);
  ZEXPERT_CHECK(num_tokens >= 0, "num_tokens must not be negative, got ", num_tokens);
  ZEXPERT_CHECK(top_k >= 1, "top_k must be at least 1, got ", top_k);
  const int64_t num_slots = row_slots.size(0);
  const int64_t hidden_size = grad_rows.size(1);
  check_row_slots_size(row_slots, num_tokens, top_k);
  check_shape(grad_rows, "grad_rows", {num_slots, hidden_size}, "[rows, hidden_size]");

  const Tensor grad_hidden_states = empty({num_tokens, hidden_size}, grad_rows.scalar_type(), grad_rows);
  if (grad_hidden_states.numel() > 0) {
    const Tensor rows = with_unit_inner_stride(grad_rows);
    const Tensor slots = as_contiguous(row_slots);
    MoePermuteBackwardParams params;
    params.grad_rows = rows.const_data_ptr();
    params.row_slots = slots.const_data_ptr<int32_t>();
    params.grad_hidden_states = grad_hidden_states.mutable_data_ptr();
    params.data_type = element_type(rows);
    params.num_rows = num_slots;
    params.num_tokens = num_tokens;
    params.top_k = top_k;
    params.hidden_size = hidden_size;
    params.grad_rows_row_stride = rows.stride(0);
    launch(params, as_contiguous(expert_offsets));
  }
  return grad_hidden_states;
}

HIDDEN_NAMESPACE_END(zexpert, ops)
