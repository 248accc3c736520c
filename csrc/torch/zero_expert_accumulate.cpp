// SPDX-License-Identifier: Apache-2.0
#include "zexpert/zero_expert_accumulate.h"

#include <tuple>

#include "torch/checks.h"
#include "torch/device.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

void check_inputs(const Tensor& hidden_states, const Tensor& zero_weight) {
  check_device(zero_weight, "zero_weight", hidden_states, "hidden_states");
  check_floating(hidden_states, "hidden_states");
  check_dtype(zero_weight, "zero_weight", weight_dtype(hidden_states.scalar_type()), hidden_states, "hidden_states");
  check_dims(hidden_states, "hidden_states", 2, "[tokens, hidden_size]");
  check_shape(zero_weight, "zero_weight", {hidden_states.size(0)}, "[tokens]");
}

/// Writes to `out`, which has been checked.
void scale(const Tensor& hidden_states, const Tensor& zero_weight, const Tensor& out, bool accumulate,
           const CurrentDevice& device) {
  if (out.numel() == 0) {
    return;
  }
  const Tensor tokens = unaliased(with_unit_inner_stride(hidden_states), out);
  const Tensor weights = unaliased(as_contiguous(zero_weight), out);
  ZeroExpertAccumulateParams params;
  params.hidden_states = tokens.const_data_ptr();
  params.zero_weight = weights.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.data_type = element_type(tokens);
  params.num_tokens = tokens.size(0);
  params.hidden_size = tokens.size(1);
  params.hidden_row_stride = tokens.stride(0);
  params.out_row_stride = out.stride(0);
  params.accumulate = accumulate;
  ZEXPERT_LAUNCH(zero_expert_accumulate, params, device);
}

Tensor zero_expert_accumulate(const Tensor& hidden_states, const Tensor& zero_weight) {
  const CurrentDevice device(hidden_states);
  check_inputs(hidden_states, zero_weight);
  const Tensor out = empty({hidden_states.size(0), hidden_states.size(1)}, hidden_states.scalar_type(), hidden_states);
  scale(hidden_states, zero_weight, out, false, device);
  return out;
}

/// `out` may be hidden_states itself.
void zero_expert_accumulate_out(const Tensor& hidden_states, const Tensor& zero_weight, const Tensor& out) {
  const CurrentDevice device(hidden_states);
  check_device(out, "out", hidden_states, "hidden_states");
  check_inputs(hidden_states, zero_weight);
  check_dtype(out, "out", hidden_states.scalar_type(), hidden_states, "hidden_states");
  check_shape(out, "out", {hidden_states.size(0), hidden_states.size(1)}, "[tokens, hidden_size]");
  const bool rows_apart = out.size(0) <= 1 || out.stride(0) >= out.size(1);
  ZEXPERT_CHECK(has_unit_inner_stride(out) && rows_apart,
                "out must have an inner stride of 1 and rows that do not overlap, got shape ", text(out.sizes()),
                " with strides ", text(out.strides()));
  scale(hidden_states, zero_weight, out, true, device);
}

std::tuple<Tensor, Tensor> zero_expert_accumulate_backward(const Tensor& grad_out, const Tensor& hidden_states,
                                                           const Tensor& zero_weight) {
  const CurrentDevice device(hidden_states);
  check_device(grad_out, "grad_out", hidden_states, "hidden_states");
  check_inputs(hidden_states, zero_weight);
  check_dtype(grad_out, "grad_out", hidden_states.scalar_type(), hidden_states, "hidden_states");
  const int64_t num_tokens = hidden_states.size(0);
  const int64_t hidden_size = hidden_states.size(1);
  check_shape(grad_out, "grad_out", {num_tokens, hidden_size}, "[tokens, hidden_size]");

  const Tensor grad_hidden_states = empty({num_tokens, hidden_size}, hidden_states.scalar_type(), hidden_states);
  const Tensor grad_zero_weight = empty({num_tokens}, zero_weight.scalar_type(), hidden_states);
  const Tensor gradients = with_unit_inner_stride(grad_out);
  const Tensor tokens = with_unit_inner_stride(hidden_states);
  const Tensor weights = as_contiguous(zero_weight);
  ZeroExpertAccumulateBackwardParams params;
  params.grad_out = gradients.const_data_ptr();
  params.hidden_states = tokens.const_data_ptr();
  params.zero_weight = weights.const_data_ptr();
  params.grad_hidden_states = grad_hidden_states.mutable_data_ptr();
  params.grad_zero_weight = grad_zero_weight.mutable_data_ptr();
  params.data_type = element_type(tokens);
  params.num_tokens = num_tokens;
  params.hidden_size = hidden_size;
  params.grad_out_row_stride = gradients.stride(0);
  params.hidden_row_stride = tokens.stride(0);
  ZEXPERT_LAUNCH(zero_expert_accumulate_backward, params, device);
  return {grad_hidden_states, grad_zero_weight};
}

}  // namespace

ZEXPERT_OPERATORS(m) {
  m.impl("zero_expert_accumulate", TORCH_BOX(&zero_expert_accumulate));
  m.impl("zero_expert_accumulate.out", TORCH_BOX(&zero_expert_accumulate_out));
  m.impl("zero_expert_accumulate_backward", TORCH_BOX(&zero_expert_accumulate_backward));
}

ZEXPERT_DEVICE_NAMESPACE_END
