// SPDX-License-Identifier: Apache-2.0
// biased_topk_and_plan as other operators of the same device call it.
#pragma once

#include <optional>
#include <tuple>

#include "torch/device.h"
#include "torch/routing_arguments.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN

/// topk_weights, topk_ids, zero_weight, constant_weight, then expert_offsets, row_slots, slot_rows.
using PlannedRoutingTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

/// Checks the tensors as the operator does; returns its results.
PlannedRoutingTensors biased_topk_and_plan(const Tensor& logits, const std::optional<Tensor>& bias,
                                           const RoutingWithChoices& routing, std::optional<DType> indices_dtype);

ZEXPERT_DEVICE_NAMESPACE_END
