// SPDX-License-Identifier: Apache-2.0
// zero_expert_accumulate for tensors on any device: checks, outputs, parameters.
#pragma once

#include "torch/checks.h"
#include "torch/tensor.h"
#include "zexpert/zero_expert_accumulate.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

inline void check_zero_expert_accumulate(const Tensor& hidden_states, const Tensor& zero_weight) {
  check_device(zero_weight, "zero_weight", hidden_states, "hidden_states");
  check_floating(hidden_states, "hidden_states");
  check_dtype(zero_weight, "zero_weight", weight_dtype(hidden_states.scalar_type()), hidden_states, "hidden_states");
  check_dims(hidden_states, "hidden_states", 2, "[tokens, hidden_size]");
  check_shape(zero_weight, "zero_weight", {hidden_states.size(0)}, "[tokens]");
}

/// `out` has been checked; `accumulate` says whether what it holds counts.
template <typename Launch>
void launch_zero_expert_accumulate(const Tensor& hidden_states, const Tensor& zero_weight, const Tensor& out,
                                   bool accumulate, const Launch& launch) {
  if (hidden_states.numel() == 0) {
    return;
  }
  const Tensor rows = unaliased(with_unit_inner_stride(hidden_states), out);
  const Tensor weights = unaliased(as_contiguous(zero_weight), out);
  ZeroExpertAccumulateParams params;
  params.hidden_states = rows.const_data_ptr();
  params.zero_weight = weights.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.data_type = element_type(rows);
  params.num_tokens = rows.size(0);
  params.hidden_size = rows.size(1);
  params.hidden_row_stride = rows.stride(0);
  params.out_row_stride = out.stride(0);
  params.accumulate = accumulate;
  launch(params);
}

/// Returns zero_weight[:, None] * hidden_states.
template <typename Launch>
Tensor zero_expert_accumulate(const Tensor& hidden_states, const Tensor& zero_weight, const Launch& launch) {
  check_zero_expert_accumulate(hidden_states, zero_weight);
  const Tensor out = empty({hidden_states.size(0), hidden_states.size(1)}, hidden_states.scalar_type(), hidden_states);
  launch_zero_expert_accumulate(hidden_states, zero_weight, out, false, launch);
  return out;
}

/// Adds zero_weight[:, None] * hidden_states to `out`, which may be hidden_states itself.
template <typename Launch>
void zero_expert_accumulate_out(const Tensor& hidden_states, const Tensor& zero_weight, const Tensor& out,
                                const Launch& launch) {
  check_device(out, "out", hidden_states, "hidden_states");
  check_zero_expert_accumulate(hidden_states, zero_weight);
  check_dtype(out, "out", hidden_states.scalar_type(), hidden_states, "hidden_states");
  check_shape(out, "out", {hidden_states.size(0), hidden_states.size(1)}, "[tokens, hidden_size]");
  const bool rows_apart = out.size(0) <= 1 || out.stride(0) >= out.size(1);
  ZEXPERT_CHECK(has_unit_inner_stride(out) && rows_apart,
                "out must have an inner stride of 1 and rows that do not overlap, got shape ", text(out.sizes()),
                " with strides ", text(out.strides()));
  launch_zero_expert_accumulate(hidden_states, zero_weight, out, true, launch);
}

HIDDEN_NAMESPACE_END(zexpert, ops)
