// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_permute.h"

#include <optional>

#include "torch/checks.h"
#include "torch/device.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

/// The plan of both directions. `data` is on the plan's device.
void check_plan(const Tensor& data, const char* data_name, const Tensor& row_slots, const Tensor& expert_offsets,
                const std::optional<Tensor>& slot_rows) {
  check_device(row_slots, "row_slots", data, data_name);
  check_device(expert_offsets, "expert_offsets", data, data_name);
  if (slot_rows) {
    check_device(*slot_rows, "slot_rows", data, data_name);
  }
  check_floating(data, data_name);
  check_dtype(row_slots, "row_slots", DType::Int);
  check_dtype(expert_offsets, "expert_offsets", DType::Int);
  if (slot_rows) {
    check_dtype(*slot_rows, "slot_rows", DType::Int);
  }
}

void check_plan_sizes(const Tensor& row_slots, const std::optional<Tensor>& slot_rows, int64_t num_tokens,
                      int64_t top_k) {
  check_row_slots_size(row_slots, num_tokens, top_k);
  if (slot_rows) {
    check_shape(*slot_rows, "slot_rows", {num_tokens, top_k}, "[tokens, top_k]");
  }
}

Tensor moe_permute(const Tensor& hidden_states, const Tensor& row_slots, const Tensor& expert_offsets, int64_t top_k,
                   const std::optional<Tensor>& slot_rows) {
  const CurrentDevice device(hidden_states);
  check_plan(hidden_states, "hidden_states", row_slots, expert_offsets, slot_rows);
  check_dims(hidden_states, "hidden_states", 2, "[tokens, hidden_size]");
  check_dims(row_slots, "row_slots", 1, "[rows]");
  check_expert_offsets_dims(expert_offsets);
  ZEXPERT_CHECK(top_k >= 1, "top_k must be at least 1, got ", top_k);
  const int64_t num_tokens = hidden_states.size(0);
  const int64_t hidden_size = hidden_states.size(1);
  check_plan_sizes(row_slots, slot_rows, num_tokens, top_k);

  const Tensor rows = empty({row_slots.size(0), hidden_size}, hidden_states.scalar_type(), hidden_states);
  const Tensor tokens = with_unit_inner_stride(hidden_states);
  const Tensor slots = as_contiguous(row_slots);
  const Tensor inverse = slot_rows ? as_contiguous(*slot_rows) : slots;
  const LastOffset last_offset(expert_offsets);
  MoePermuteParams params;
  params.hidden_states = tokens.const_data_ptr();
  params.row_slots = slots.const_data_ptr<int32_t>();
  params.slot_rows = slot_rows ? inverse.const_data_ptr<int32_t>() : nullptr;
  params.rows = rows.mutable_data_ptr();
  params.data_type = element_type(tokens);
  params.num_rows = rows.size(0);
  params.num_tokens = num_tokens;
  params.top_k = top_k;
  params.hidden_size = hidden_size;
  params.hidden_row_stride = tokens.stride(0);
  params.last_offset = last_offset.pointer();
  ZEXPERT_LAUNCH(moe_permute, params, device);
  return rows;
}

Tensor moe_permute_backward(const Tensor& grad_rows, const Tensor& row_slots, const Tensor& expert_offsets,
                            int64_t num_tokens, int64_t top_k, const std::optional<Tensor>& slot_rows) {
  const CurrentDevice device(grad_rows);
  check_plan(grad_rows, "grad_rows", row_slots, expert_offsets, slot_rows);
  check_dims(grad_rows, "grad_rows", 2, "[rows, hidden_size]");
  check_dims(row_slots, "row_slots", 1, "[rows]");
  check_expert_offsets_dims(expert_offsets);
  ZEXPERT_CHECK(num_tokens >= 0, "num_tokens must not be negative, got ", num_tokens);
  ZEXPERT_CHECK(top_k >= 1, "top_k must be at least 1, got ", top_k);
  const int64_t hidden_size = grad_rows.size(1);
  check_plan_sizes(row_slots, slot_rows, num_tokens, top_k);
  check_shape(grad_rows, "grad_rows", {row_slots.size(0), hidden_size}, "[rows, hidden_size]");

  const Tensor grad_hidden_states = empty({num_tokens, hidden_size}, grad_rows.scalar_type(), grad_rows);
  const Tensor rows = with_unit_inner_stride(grad_rows);
  const Tensor slots = as_contiguous(row_slots);
  const Tensor inverse = slot_rows ? as_contiguous(*slot_rows) : slots;
  const LastOffset last_offset(expert_offsets);
  MoePermuteBackwardParams params;
  params.grad_rows = rows.const_data_ptr();
  params.row_slots = slots.const_data_ptr<int32_t>();
  params.slot_rows = slot_rows ? inverse.const_data_ptr<int32_t>() : nullptr;
  params.grad_hidden_states = grad_hidden_states.mutable_data_ptr();
  params.data_type = element_type(rows);
  params.num_rows = rows.size(0);
  params.num_tokens = num_tokens;
  params.top_k = top_k;
  params.hidden_size = hidden_size;
  params.grad_rows_row_stride = rows.stride(0);
  params.last_offset = last_offset.pointer();
  const std::optional<Tensor> workspace =
      empty_workspace(ZEXPERT_WORKSPACE_BYTES(moe_permute_backward, params), grad_rows);
  params.workspace = workspace ? workspace->mutable_data_ptr() : nullptr;
  ZEXPERT_LAUNCH(moe_permute_backward, params, device);
  return grad_hidden_states;
}

}  // namespace

ZEXPERT_OPERATORS(m) {
  m.impl("moe_permute", TORCH_BOX(&moe_permute));
  m.impl("moe_permute_backward", TORCH_BOX(&moe_permute_backward));
}

ZEXPERT_DEVICE_NAMESPACE_END
