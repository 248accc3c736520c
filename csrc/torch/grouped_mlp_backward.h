// SPDX-License-Identifier: Apache-2.0
// grouped_mlp_backward for tensors on any device: checks, outputs, parameters.
#pragma once

#include <initializer_list>
#include <optional>

#include "torch/checks.h"
#include "torch/grouped_mlp.h"
#include "torch/tensor.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Which gradients the caller wants; the others cost nothing and are empty tensors.
struct GroupedMlpNeeds {
  bool rows;
  bool w13_weight;
  bool w2_weight;
};

/// What grouped_mlp_backward works on: the forward's parameters, but for the output, and these.
struct GroupedMlpBackwardParams {
  GroupedMlpParams forward;
  GroupedMlpNeeds needs;
  const void* grad_out = nullptr;  ///< [num_rows, hidden_size]; unit inner stride
  const void* gate_up = nullptr;   ///< [num_rows, 2 * intermediate_size], unit inner stride; null: to be recomputed
  int64_t grad_out_row_stride = 0;
  int64_t gate_up_row_stride = 0;
};

/// The results, dense.
struct GroupedMlpGradients {
  Tensor rows;        ///< [num_rows, hidden_size]; 0 past the last offset
  Tensor w13_weight;  ///< [num_experts, 2 * intermediate_size, hidden_size]; 0 for an expert without rows
  Tensor w2_weight;   ///< [num_experts, hidden_size, intermediate_size]; likewise
};

inline GroupedMlpGradients empty_gradients(const GroupedMlpNeeds& needs, int64_t num_rows, int64_t num_experts,
                                           int64_t hidden_size, int64_t intermediate_size, const Tensor& like) {
  const auto allocate = [&](bool is_needed, std::initializer_list<int64_t> sizes) {
    return is_needed ? empty(sizes, like.scalar_type(), like) : empty({0}, like.scalar_type(), like);
  };
  return {allocate(needs.rows, {num_rows, hidden_size}),
          allocate(needs.w13_weight, {num_experts, 2 * intermediate_size, hidden_size}),
          allocate(needs.w2_weight, {num_experts, hidden_size, intermediate_size})};
}

inline void zero_gradients(const GroupedMlpGradients& gradients) {
  zero_rows(gradients.rows, 0, gradients.rows.size(0));
  zero_rows(gradients.w13_weight, 0, gradients.w13_weight.size(0));
  zero_rows(gradients.w2_weight, 0, gradients.w2_weight.size(0));
}

/// Calls launch(params, gradients) unless the gradients are empty or sums of nothing; returns gradients.
template <typename Launch>
GroupedMlpGradients grouped_mlp_backward(const Tensor& grad_out, const Tensor& rows, const Tensor& expert_offsets,
                                         const Tensor& w13_weight, const Tensor& w2_weight,
                                         const std::optional<Tensor>& gate_up, const GroupedMlpNeeds& needs,
                                         const Launch& launch) {
  check_device(grad_out, "grad_out", rows, "rows");
  if (gate_up) {
    check_device(*gate_up, "gate_up", rows, "rows");
  }
  check_grouped_mlp(rows, expert_offsets, w13_weight, w2_weight);
  check_dtype(grad_out, "grad_out", rows.scalar_type(), rows, "rows");
  if (gate_up) {
    check_dtype(*gate_up, "gate_up", rows.scalar_type(), rows, "rows");
  }
  const int64_t num_rows = rows.size(0);
  const int64_t hidden = rows.size(1);
  const int64_t num_experts = w13_weight.size(0);
  const int64_t inner = w2_weight.size(2);
  check_shape(grad_out, "grad_out", {num_rows, hidden}, "[rows, hidden_size]");
  if (gate_up) {
    check_shape(*gate_up, "gate_up", {num_rows, 2 * inner}, "[rows, 2 * intermediate_size]");
  }

  const GroupedMlpGradients gradients = empty_gradients(needs, num_rows, num_experts, hidden, inner, rows);
  if (num_rows == 0 || hidden == 0 || inner == 0) {
    zero_gradients(gradients);
    return gradients;
  }

  const GroupedMlpInputs inputs(rows, expert_offsets, w13_weight, w2_weight);
  const Tensor grad_out_rows = with_unit_inner_stride(grad_out);
  GroupedMlpBackwardParams params;
  params.forward = inputs.params;
  params.needs = needs;
  params.grad_out = grad_out_rows.const_data_ptr();
  params.grad_out_row_stride = grad_out_rows.stride(0);
  std::optional<Tensor> gate_up_rows;
  if (gate_up) {
    gate_up_rows = with_unit_inner_stride(*gate_up);
    params.gate_up = gate_up_rows->const_data_ptr();
    params.gate_up_row_stride = gate_up_rows->stride(0);
  }
  launch(params, gradients);
  return gradients;
}

HIDDEN_NAMESPACE_END(zexpert, ops)
