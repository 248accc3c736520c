// SPDX-License-Identifier: Apache-2.0
// silu_and_mul for tensors on any device: checks, output, parameters.
#pragma once

#include <optional>

#include "torch/checks.h"
#include "torch/tensor.h"
#include "zexpert/silu_and_mul.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Calls launch(params, expert_offsets) unless there is nothing to compute. params.num_rows is the number of all rows:
/// what the last of the offsets, if given, says is left to the launch.
template <typename Launch>
Tensor silu_and_mul(const Tensor& gate_up, const std::optional<Tensor>& expert_offsets, const Launch& launch) {
  if (expert_offsets) {
    check_device(*expert_offsets, "expert_offsets", gate_up, "gate_up");
  }
  check_floating(gate_up, "gate_up");
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
  const Tensor out = empty({num_rows, intermediate_size}, gate_up.scalar_type(), gate_up);
  if (out.numel() > 0) {
    const Tensor rows = with_unit_inner_stride(gate_up);
    SiluAndMulParams params;
    params.gate_up = rows.const_data_ptr();
    params.out = out.mutable_data_ptr();
    params.data_type = element_type(rows);
    params.num_rows = num_rows;
    params.intermediate_size = intermediate_size;
    params.gate_up_row_stride = rows.stride(0);
    params.out_row_stride = out.stride(0);
    launch(params, expert_offsets ? std::optional(as_contiguous(*expert_offsets)) : std::nullopt);
  }
  return out;
}

HIDDEN_NAMESPACE_END(zexpert, ops)
