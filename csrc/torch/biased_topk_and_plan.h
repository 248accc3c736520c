// SPDX-License-Identifier: Apache-2.0
// biased_topk_and_plan for tensors on any device: outputs, parameters. biased_topk.h checks the arguments.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "torch/biased_topk.h"
#include "torch/moe_plan.h"
#include "torch/tensor.h"
#include "zexpert/biased_topk_and_plan.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Routing, then plan: expert_offsets, row_slots, slot_rows.
using PlannedRoutingTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

/// Calls launch(params) unless there are no tokens.
template <typename Launch>
PlannedRoutingTensors biased_topk_and_plan(const Tensor& logits, const std::optional<Tensor>& bias,
                                           const RoutingSpec& spec, std::optional<DType> indices_dtype,
                                           const Launch& launch) {
  std::optional<PlanTensors> plan;
  const RoutingTensors routing = biased_topk(
      logits, bias, spec, indices_dtype, [&](const BiasedTopKParams& routing_params, const Tensor& topk_ids) {
        plan = moe_plan(topk_ids, spec.num_real_experts, [&](const MoePlanParams& plan_params) {
          BiasedTopKAndPlanParams params;
          params.routing = routing_params;
          params.expert_offsets = plan_params.expert_offsets;
          params.row_slots = plan_params.row_slots;
          params.slot_rows = plan_params.slot_rows;
          launch(params);
        });
      });
  if (!plan) {
    plan = moe_plan(std::get<1>(routing), spec.num_real_experts, [](const MoePlanParams&) {});
  }
  return std::tuple_cat(routing, *plan);
}

HIDDEN_NAMESPACE_END(zexpert, ops)
