// SPDX-License-Identifier: Apache-2.0
// The tensors of a plan, which moe_plan and biased_topk_and_plan return.
#pragma once

#include <cstdint>
#include <limits>
#include <tuple>

#include "torch/tensor.h"
#include "zexpert/error.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// expert_offsets, row_slots, slot_rows
using PlanTensors = std::tuple<Tensor, Tensor, Tensor>;

/// Uninitialised tensors for the plan of topk_ids [tokens, top_k] over num_experts experts, if it can be made.
inline PlanTensors empty_plan(const Tensor& topk_ids, int64_t num_experts) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  ZEXPERT_CHECK(topk_ids.numel() < kMost, "topk_ids must have fewer than ", kMost, " elements, got shape ",
                text(topk_ids.sizes()));
  ZEXPERT_CHECK(num_experts >= 1 && num_experts < kMost, "num_experts must be between 1 and ", kMost - 1, ", got ",
                num_experts);
  return {empty({num_experts + 1}, DType::Int, topk_ids), empty({topk_ids.numel()}, DType::Int, topk_ids),
          empty({topk_ids.size(0), topk_ids.size(1)}, DType::Int, topk_ids)};
}

/// Makes params write the plan.
template <typename Params>
void set_plan(Params& params, const PlanTensors& plan) {
  const auto& [expert_offsets, row_slots, slot_rows] = plan;
  params.expert_offsets = expert_offsets.template mutable_data_ptr<int32_t>();
  params.row_slots = row_slots.template mutable_data_ptr<int32_t>();
  params.slot_rows = slot_rows.template mutable_data_ptr<int32_t>();
}

HIDDEN_NAMESPACE_END(zexpert, ops)
