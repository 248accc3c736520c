// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_combine.h"

#include <limits>
#include <optional>

#include "torch/box.h"
#include "torch/checks.h"
#include "torch/device.h"
#include "torch/rank_arrays.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

void moe_combine(const Tensor& rows, const Tensor& slot_rows, const std::optional<Tensor>& topk_weights,
                 const TensorList& out, int64_t rank, int64_t most_multiprocessors) {
  const CurrentDevice device(rows);
  check_device(slot_rows, "slot_rows", rows, "rows");
  if (topk_weights) {
    check_device(*topk_weights, "topk_weights", rows, "rows");
  }
  check_floating(rows, "rows");
  const DType data = rows.scalar_type();
  check_dtype(slot_rows, "slot_rows", DType::Int);
  if (topk_weights) {
    check_dtype(*topk_weights, "topk_weights", weight_dtype(data), rows, "rows");
  }
  check_dims(rows, "rows", 2, "[rows, hidden_size]");
  check_dims(slot_rows, "slot_rows", 2, "[ranks * max_tokens, top_k]");
  const int64_t hidden_size = rows.size(1);
  const int64_t top_k = slot_rows.size(1);
  constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();
  ZEXPERT_CHECK(rows.size(0) < kMostRows, "rows must have fewer than ", kMostRows, " rows, got ", rows.size(0));
  check_ranks(out, "out", rank);
  const auto num_ranks = static_cast<int64_t>(out.size());
  check_dims(out[0], "out", 3, "[ranks, max_tokens, hidden_size]");
  const int64_t max_tokens = out[0].size(1);
  check_rank_tensors(out, "out", num_ranks, rows, "rows", data, {num_ranks, max_tokens, hidden_size},
                     "[ranks, max_tokens, hidden_size]");
  check_shape(slot_rows, "slot_rows", {num_ranks * max_tokens, top_k}, "[ranks * max_tokens, top_k]");
  if (topk_weights) {
    check_shape(*topk_weights, "topk_weights", {num_ranks * max_tokens, top_k}, "[ranks * max_tokens, top_k]");
  }

  const Tensor expert_rows = with_unit_inner_stride(rows);
  const Tensor row_of_slot = as_contiguous(slot_rows);
  MoeCombineParams params;
  params.rows = expert_rows.const_data_ptr();
  params.slot_rows = row_of_slot.const_data_ptr<int32_t>();
  params.out = rank_arrays(out);
  params.data_type = element_type(rows);
  params.rank = rank;
  params.num_ranks = num_ranks;
  params.max_tokens = max_tokens;
  params.top_k = top_k;
  params.num_rows = rows.size(0);
  params.hidden_size = hidden_size;
  params.rows_row_stride = expert_rows.stride(0);
  params.most_multiprocessors = most_multiprocessors;
  std::optional<Tensor> weights;
  if (topk_weights) {
    weights = as_contiguous(*topk_weights);
    params.topk_weights = weights->const_data_ptr();
  }
  ZEXPERT_LAUNCH(moe_combine, params, device);
}

}  // namespace

ZEXPERT_OPERATORS(m) { m.impl("moe_combine", ZEXPERT_BOX(&moe_combine)); }

ZEXPERT_DEVICE_NAMESPACE_END
