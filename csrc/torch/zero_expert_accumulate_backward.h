// SPDX-License-Identifier: Apache-2.0
// zero_expert_accumulate_backward for tensors on any device: checks, outputs, parameters.
#pragma once

#include <tuple>

#include "torch/checks.h"
#include "torch/tensor.h"
#include "torch/zero_expert_accumulate.h"
#include "zexpert/zero_expert_accumulate_backward.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Calls launch(params) unless there are no tokens; returns (grad_hidden_states, grad_zero_weight).
template <typename Launch>
std::tuple<Tensor, Tensor> zero_expert_accumulate_backward(const Tensor& grad_out, const Tensor& hidden_states,
                                                           const Tensor& zero_weight, const Launch& launch) {
  check_device(grad_out, "grad_out", hidden_states, "hidden_states");
  check_zero_expert_accumulate(hidden_states, zero_weight);
  check_dtype(grad_out, "grad_out", hidden_states.scalar_type(), hidden_states, "hidden_states");
  const int64_t num_tokens = hidden_states.size(0);
  const int64_t hidden_size = hidden_states.size(1);
  check_shape(grad_out, "grad_out", {num_tokens, hidden_size}, "[tokens, hidden_size]");

  const Tensor grad_hidden_states = empty({num_tokens, hidden_size}, hidden_states.scalar_type(), hidden_states);
  const Tensor grad_zero_weight = empty({num_tokens}, zero_weight.scalar_type(), hidden_states);
  if (num_tokens > 0) {
    const Tensor gradients = with_unit_inner_stride(grad_out);
    const Tensor rows = with_unit_inner_stride(hidden_states);
    const Tensor weights = as_contiguous(zero_weight);
    ZeroExpertAccumulateBackwardParams params;
    params.grad_out = gradients.const_data_ptr();
    params.hidden_states = rows.const_data_ptr();
    params.zero_weight = weights.const_data_ptr();
    params.grad_hidden_states = grad_hidden_states.mutable_data_ptr();
    params.grad_zero_weight = grad_zero_weight.mutable_data_ptr();
    params.data_type = element_type(rows);
    params.num_tokens = num_tokens;
    params.hidden_size = hidden_size;
    params.grad_out_row_stride = gradients.stride(0);
    params.hidden_row_stride = rows.stride(0);
    launch(params);
  }
  return {grad_hidden_states, grad_zero_weight};
}

HIDDEN_NAMESPACE_END(zexpert, ops)
