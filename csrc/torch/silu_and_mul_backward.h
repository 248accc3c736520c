// SPDX-License-Identifier: Apache-2.0
// silu_and_mul_backward for tensors on any device: checks, output, parameters.
#pragma once

#include <optional>

#include "torch/checks.h"
#include "torch/tensor.h"
#include "zexpert/silu_and_mul_backward.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Calls launch(params, expert_offsets, grad_gate_up) unless there is nothing to compute. params.num_rows is the number
/// of all rows: what the last of the offsets, if given, says is left to the launch, zeros from there on included.
template <typename Launch>
Tensor silu_and_mul_backward(const Tensor& grad_out, const Tensor& gate_up, const std::optional<Tensor>& expert_offsets,
                             const Launch& launch) {
  check_device(grad_out, "grad_out", gate_up, "gate_up");
  if (expert_offsets) {
    check_device(*expert_offsets, "expert_offsets", gate_up, "gate_up");
  }
  check_floating(gate_up, "gate_up");
  check_dtype(grad_out, "grad_out", gate_up.scalar_type(), gate_up, "gate_up");
  if (expert_offsets) {
    check_dtype(*expert_offsets, "expert_offsets", DType::Int);
  }
  check_dims(gate_up, "gate_up", 2, "[rows, 2 * intermediate_size]");
  if (expert_offsets) {
    check_expert_offsets_dims(*expert_offsets);
  }
  ZEXPERT_CHECK(gate_up.size(1) % 2 == 0, "gate_up must have an even number of columns, got shape ",
                text(gate_up.sizes()));
  const int64_t num_rows = gate_up.size(0);
  const int64_t intermediate_size = gate_up.size(1) / 2;
  check_shape(grad_out, "grad_out", {num_rows, intermediate_size}, "[rows, intermediate_size]");

  const Tensor grad_gate_up = empty({num_rows, 2 * intermediate_size}, gate_up.scalar_type(), gate_up);
  if (grad_gate_up.numel() > 0) {
    const Tensor gradients = with_unit_inner_stride(grad_out);
    const Tensor rows = with_unit_inner_stride(gate_up);
    SiluAndMulBackwardParams params;
    params.grad_out = gradients.const_data_ptr();
    params.gate_up = rows.const_data_ptr();
    params.grad_gate_up = grad_gate_up.mutable_data_ptr();
    params.data_type = element_type(rows);
    params.num_rows = num_rows;
    params.intermediate_size = intermediate_size;
    params.grad_out_row_stride = gradients.stride(0);
    params.gate_up_row_stride = rows.stride(0);
    params.grad_gate_up_row_stride = grad_gate_up.stride(0);
    std::optional<Tensor> offsets;
    if (expert_offsets) {
      offsets = as_contiguous(*expert_offsets);
    }
    launch(params, offsets, grad_gate_up);
  }
  return grad_gate_up;
}

HIDDEN_NAMESPACE_END(zexpert, ops)
