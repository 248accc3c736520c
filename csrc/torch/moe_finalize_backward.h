// SPDX-License-Identifier: Apache-2.0
// moe_finalize_backward for tensors on any device: checks, outputs, parameters.
#pragma once

#include <optional>
#include <tuple>

#include "torch/checks.h"
#include "torch/moe_finalize.h"
#include "torch/tensor.h"
#include "zexpert/moe_finalize_backward.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Calls launch(params) unless there are no tokens; returns (grad_rows, grad_topk_weights, grad_hidden_states,
/// grad_zero_weight).
template <typename Launch>
std::tuple<Tensor, Tensor, Tensor, Tensor> moe_finalize_backward(const Tensor& grad_out, const Tensor& rows,
                                                                 const Tensor& slot_rows, const Tensor& topk_weights,
                                                                 const Tensor& hidden_states, const Tensor& zero_weight,
                                                                 const Launch& launch) {
  check_device(grad_out, "grad_out", hidden_states, "hidden_states");
  const std::optional<Tensor> none;
  check_moe_finalize({rows, slot_rows, topk_weights, hidden_states, zero_weight, none, none, none});
  check_dtype(grad_out, "grad_out", hidden_states.scalar_type(), hidden_states, "hidden_states");
  const int64_t num_tokens = hidden_states.size(0);
  const int64_t hidden_size = hidden_states.size(1);
  const int64_t num_rows = rows.size(0);
  const int64_t top_k = slot_rows.size(1);
  check_shape(grad_out, "grad_out", {num_tokens, hidden_size}, "[tokens, hidden_size]");

  const DType data = hidden_states.scalar_type();
  const Tensor grad_rows = empty({num_rows, hidden_size}, data, hidden_states);
  const Tensor grad_topk_weights = empty({num_tokens, top_k}, topk_weights.scalar_type(), hidden_states);
  const Tensor grad_hidden_states = empty({num_tokens, hidden_size}, data, hidden_states);
  const Tensor grad_zero_weight = empty({num_tokens}, zero_weight.scalar_type(), hidden_states);
  if (num_tokens > 0) {
    const Tensor gradients = with_unit_inner_stride(grad_out);
    const Tensor expert_rows = with_unit_inner_stride(rows);
    const Tensor row_of_slot = as_contiguous(slot_rows);
    const Tensor weights = as_contiguous(topk_weights);
    const Tensor tokens = with_unit_inner_stride(hidden_states);
    const Tensor zero_weights = as_contiguous(zero_weight);
    MoeFinalizeBackwardParams params;
    params.grad_out = gradients.const_data_ptr();
    params.rows = expert_rows.const_data_ptr();
    params.slot_rows = row_of_slot.const_data_ptr<int32_t>();
    params.topk_weights = weights.const_data_ptr();
    params.hidden_states = tokens.const_data_ptr();
    params.zero_weight = zero_weights.const_data_ptr();
    params.grad_rows = grad_rows.mutable_data_ptr();
    params.grad_topk_weights = grad_topk_weights.mutable_data_ptr();
    params.grad_hidden_states = grad_hidden_states.mutable_data_ptr();
    params.grad_zero_weight = grad_zero_weight.mutable_data_ptr();
    params.data_type = element_type(hidden_states);
    params.num_rows = num_rows;
    params.num_tokens = num_tokens;
    params.top_k = top_k;
    params.hidden_size = hidden_size;
    params.grad_out_row_stride = gradients.stride(0);
    params.rows_row_stride = expert_rows.stride(0);
    params.hidden_row_stride = tokens.stride(0);
    launch(params);
  }
  return {grad_rows, grad_topk_weights, grad_hidden_states, grad_zero_weight};
}

HIDDEN_NAMESPACE_END(zexpert, ops)
