// SPDX-License-Identifier: Apache-2.0
// moe_plan for tensors on any device: checks, outputs, parameters.
#pragma once

#include <cstdint>
#include <limits>
#include <tuple>

#include "torch/checks.h"
#include "torch/tensor.h"
#include "zexpert/moe_plan.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// expert_offsets, row_slots, slot_rows
using PlanTensors = std::tuple<Tensor, Tensor, Tensor>;

/// Calls launch(params) unless there are no slots.
template <typename Launch>
PlanTensors moe_plan(const Tensor& topk_ids, int64_t num_experts, const Launch& launch) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check_memory(topk_ids, "topk_ids");
  const DType ids_dtype = topk_ids.scalar_type();
  ZEXPERT_CHECK(ids_dtype == DType::Int || ids_dtype == DType::Long, "topk_ids must be int32 or int64, got ",
                text(ids_dtype));
  check_dims(topk_ids, "topk_ids", 2, "[tokens, top_k]");
  ZEXPERT_CHECK(topk_ids.numel() < kMost, "topk_ids must have fewer than ", kMost, " elements, got shape ",
                text(topk_ids.sizes()));
  ZEXPERT_CHECK(num_experts >= 1 && num_experts < kMost, "num_experts must be between 1 and ", kMost - 1, ", got ",
                num_experts);

  const Tensor expert_offsets = empty({num_experts + 1}, DType::Int, topk_ids);
  const Tensor row_slots = empty({topk_ids.numel()}, DType::Int, topk_ids);
  const Tensor slot_rows = empty({topk_ids.size(0), topk_ids.size(1)}, DType::Int, topk_ids);
  if (topk_ids.numel() == 0) {
    Tensor no_rows = expert_offsets;
    torch::stable::zero_(no_rows);
    return {expert_offsets, row_slots, slot_rows};
  }
  const Tensor ids = as_contiguous(topk_ids);
  MoePlanParams params;
  params.topk_ids = ids.const_data_ptr();
  params.ids_type = element_type(ids);
  params.expert_offsets = expert_offsets.mutable_data_ptr<int32_t>();
  params.row_slots = row_slots.mutable_data_ptr<int32_t>();
  params.slot_rows = slot_rows.mutable_data_ptr<int32_t>();
  params.num_slots = ids.numel();
  params.num_experts = num_experts;
  launch(params);
  return {expert_offsets, row_slots, slot_rows};
}

HIDDEN_NAMESPACE_END(zexpert, ops)
