// SPDX-License-Identifier: Apache-2.0
#include "zexpert/silu_and_mul.h"

#include <optional>

#include "torch/checks.h"
#include "torch/device.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

void check_gate_up(const Tensor& gate_up, const std::optional<Tensor>& expert_offsets) {
  check_dims(gate_up, "gate_up", 2, "[rows, 2 * intermediate_size]");
  if (expert_offsets) {
    check_expert_offsets_dims(*expert_offsets);
  }
  ZEXPERT_CHECK(gate_up.size(1) % 2 == 0, "gate_up must have an even number of columns, got shape ",
                text(gate_up.sizes()));
}

Tensor silu_and_mul(const Tensor& gate_up, const std::optional<Tensor>& expert_offsets) {
  const CurrentDevice device(gate_up);
  if (expert_offsets) {
    check_device(*expert_offsets, "expert_offsets", gate_up, "gate_up");
  }
  check_floating(gate_up, "gate_up");
  if (expert_offsets) {
    check_dtype(*expert_offsets, "expert_offsets", DType::Int);
  }
  check_gate_up(gate_up, expert_offsets);

  const int64_t intermediate_size = gate_up.size(1) / 2;
  const Tensor out = empty({gate_up.size(0), intermediate_size}, gate_up.scalar_type(), gate_up);
  const Tensor rows = with_unit_inner_stride(gate_up);
  const LastOffset last_offset(expert_offsets);
  SiluAndMulParams params;
  params.gate_up = rows.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.data_type = element_type(rows);
  params.num_rows = rows.size(0);
  params.intermediate_size = intermediate_size;
  params.gate_up_row_stride = rows.stride(0);
  params.out_row_stride = out.stride(0);
  params.last_offset = last_offset.pointer();
  ZEXPERT_LAUNCH(silu_and_mul, params, device);
  return out;
}

Tensor silu_and_mul_backward(const Tensor& grad_out, const Tensor& gate_up,
                             const std::optional<Tensor>& expert_offsets) {
  const CurrentDevice device(gate_up);
  check_device(grad_out, "grad_out", gate_up, "gate_up");
  if (expert_offsets) {
    check_device(*expert_offsets, "expert_offsets", gate_up, "gate_up");
  }
  check_floating(gate_up, "gate_up");
  check_dtype(grad_out, "grad_out", gate_up.scalar_type(), gate_up, "gate_up");
  if (expert_offsets) {
    check_dtype(*expert_offsets, "expert_offsets", DType::Int);
  }
  check_gate_up(gate_up, expert_offsets);
  const int64_t num_rows = gate_up.size(0);
  const int64_t intermediate_size = gate_up.size(1) / 2;
  check_shape(grad_out, "grad_out", {num_rows, intermediate_size}, "[rows, intermediate_size]");

  const Tensor grad_gate_up = empty({num_rows, 2 * intermediate_size}, gate_up.scalar_type(), gate_up);
  const Tensor gradients = with_unit_inner_stride(grad_out);
  const Tensor rows = with_unit_inner_stride(gate_up);
  const LastOffset last_offset(expert_offsets);
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
  params.last_offset = last_offset.pointer();
  ZEXPERT_LAUNCH(silu_and_mul_backward, params, device);
  return grad_gate_up;
}

}  // namespace

ZEXPERT_OPERATORS(m) {
  m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul));
  m.impl("silu_and_mul_backward", TORCH_BOX(&silu_and_mul_backward));
}

ZEXPERT_DEVICE_NAMESPACE_END
