// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_dispatch.h"

#include <tuple>

#include "torch/box.h"
#include "torch/checks.h"
#include "torch/device.h"
#include "torch/rank_arrays.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

std::tuple<Tensor, Tensor> moe_dispatch(const Tensor& hidden_states, const Tensor& topk_ids, const Tensor& topk_weights,
                                        const TensorList& rows, const TensorList& ids, const TensorList& weights,
                                        int64_t rank, int64_t num_local_experts, int64_t most_multiprocessors) {
  const CurrentDevice device(hidden_states);
  check_device(topk_ids, "topk_ids", hidden_states, "hidden_states");
  check_device(topk_weights, "topk_weights", hidden_states, "hidden_states");
  check_floating(hidden_states, "hidden_states");
  const DType data = hidden_states.scalar_type();
  const DType ids_dtype = topk_ids.scalar_type();
  ZEXPERT_CHECK(ids_dtype == DType::Int || ids_dtype == DType::Long, "topk_ids must be int32 or int64, got ",
                text(ids_dtype));
  check_dtype(topk_weights, "topk_weights", weight_dtype(data), hidden_states, "hidden_states");
  check_dims(hidden_states, "hidden_states", 2, "[tokens, hidden_size]");
  check_dims(topk_ids, "topk_ids", 2, "[tokens, top_k]");
  const int64_t num_tokens = hidden_states.size(0);
  const int64_t hidden_size = hidden_states.size(1);
  const int64_t top_k = topk_ids.size(1);
  check_shape(topk_ids, "topk_ids", {num_tokens, top_k}, "[tokens, top_k]");
  check_shape(topk_weights, "topk_weights", {num_tokens, top_k}, "[tokens, top_k]");
  check_ranks(rows, "rows", rank);
  const auto num_ranks = static_cast<int64_t>(rows.size());
  check_dims(rows[0], "rows", 3, "[ranks, max_tokens, hidden_size]");
  const int64_t max_tokens = rows[0].size(1);
  check_rank_tensors(rows, "rows", num_ranks, hidden_states, "hidden_states", data,
                     {num_ranks, max_tokens, hidden_size}, "[ranks, max_tokens, hidden_size]");
  check_rank_tensors(ids, "ids", num_ranks, hidden_states, "hidden_states", DType::Int, {num_ranks, max_tokens, top_k},
                     "[ranks, max_tokens, top_k]");
  check_rank_tensors(weights, "weights", num_ranks, hidden_states, "hidden_states", weight_dtype(data),
                     {num_ranks, max_tokens, top_k}, "[ranks, max_tokens, top_k]");
  ZEXPERT_CHECK(num_tokens <= max_tokens, "hidden_states must have at most max_tokens (", max_tokens, ") tokens, got ",
                num_tokens);

  const Tensor slot_rows = empty({num_tokens, num_ranks}, DType::Int, hidden_states);
  const Tensor row_tokens = empty({num_ranks, max_tokens}, DType::Int, hidden_states);
  const Tensor tokens = with_unit_inner_stride(hidden_states);
  const Tensor expert_ids = as_contiguous(topk_ids);
  const Tensor expert_weights = as_contiguous(topk_weights);
  MoeDispatchParams params;
  params.hidden_states = tokens.const_data_ptr();
  params.topk_ids = expert_ids.const_data_ptr();
  params.topk_weights = expert_weights.const_data_ptr();
  params.rows = rank_arrays(rows);
  params.ids = rank_arrays(ids);
  params.weights = rank_arrays(weights);
  params.slot_rows = slot_rows.mutable_data_ptr<int32_t>();
  params.row_tokens = row_tokens.mutable_data_ptr<int32_t>();
  params.data_type = element_type(tokens);
  params.ids_type = element_type(expert_ids);
  params.rank = rank;
  params.num_ranks = num_ranks;
  params.max_tokens = max_tokens;
  params.num_local_experts = num_local_experts;
  params.num_tokens = num_tokens;
  params.top_k = top_k;
  params.hidden_size = hidden_size;
  params.hidden_row_stride = tokens.stride(0);
  params.most_multiprocessors = most_multiprocessors;
  ZEXPERT_LAUNCH(moe_dispatch, params, device);
  return {slot_rows, row_tokens};
}

}  // namespace

ZEXPERT_OPERATORS(m) { m.impl("moe_dispatch", ZEXPERT_BOX(&moe_dispatch)); }

ZEXPERT_DEVICE_NAMESPACE_END
