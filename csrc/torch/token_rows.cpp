// SPDX-License-Identifier: Apache-2.0
#include "torch/token_rows.h"

#include "torch/device.h"
#include "zexpert/moe_finalize.h"
#include "zexpert/moe_permute.h"
#include "zexpert/zero_idle.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

/// Rows [rows, row_size] of `tokens`, num_tokens rows of row_size elements, each with `top_k` slots.
Tensor gather(const Tensor& tokens, int64_t num_tokens, int64_t row_size, int64_t row_stride, int64_t top_k,
              const int32_t* slot_rows, const ExpertInputs& inputs) {
  const CurrentDevice device(tokens);
  const Tensor rows = empty({inputs.num_rows(), row_size}, tokens.scalar_type(), tokens);
  MoePermuteParams params;
  params.hidden_states = tokens.const_data_ptr();
  params.row_slots = inputs.row_slots->const_data_ptr<int32_t>();
  params.slot_rows = slot_rows;
  params.rows = rows.mutable_data_ptr();
  params.data_type = element_type(tokens);
  params.num_rows = rows.size(0);
  params.num_tokens = num_tokens;
  params.top_k = top_k;
  params.hidden_size = row_size;
  params.hidden_row_stride = row_stride;
  params.last_offset = inputs.last_offset();
  ZEXPERT_LAUNCH(moe_permute, params, device);
  return rows;
}

}  // namespace

Tensor gather_rows(const Tensor& tokens, const ExpertInputs& inputs) {
  const int32_t* slot_rows = inputs.slot_rows ? inputs.slot_rows->const_data_ptr<int32_t>() : nullptr;
  return gather(tokens, tokens.size(0), tokens.size(1), tokens.stride(0), inputs.top_k, slot_rows, inputs);
}

Tensor gather_row_weights(const Tensor& topk_weights, const ExpertInputs& inputs) {
  // Every slot is a token of one element, with one slot.
  return gather(topk_weights, topk_weights.numel(), 1, 1, 1, nullptr, inputs);
}

Tensor scatter_row_weights(const Tensor& row_weights, const ExpertInputs& inputs) {
  // Every slot is a token of one element, with one slot of weight 1.
  const CurrentDevice device(row_weights);
  const Tensor& slot_rows = *inputs.slot_rows;
  const Tensor slot_weights = empty({slot_rows.size(0), slot_rows.size(1)}, row_weights.scalar_type(), row_weights);
  MoeFinalizeParams params;
  params.rows = row_weights.const_data_ptr();
  params.slot_rows = slot_rows.const_data_ptr<int32_t>();
  params.out = slot_weights.mutable_data_ptr();
  params.data_type = element_type(row_weights);
  params.num_rows = row_weights.numel();
  params.num_tokens = slot_rows.numel();
  params.top_k = 1;
  params.hidden_size = 1;
  params.rows_row_stride = 1;
  params.out_row_stride = 1;
  ZEXPERT_LAUNCH(moe_finalize, params, device);
  return slot_weights;
}

void zero_idle_rows(const Tensor& rows, const ExpertInputs& inputs) {
  const CurrentDevice device(rows);
  ZeroIdleRowsParams params;
  params.data = rows.mutable_data_ptr();
  params.last_offset = inputs.last_offset();
  params.data_type = element_type(rows);
  params.num_rows = rows.size(0);
  params.row_size = rows.size(1);
  ZEXPERT_LAUNCH(zero_idle_rows, params, device);
}

ZEXPERT_DEVICE_NAMESPACE_END
