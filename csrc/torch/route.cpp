// SPDX-License-Identifier: Apache-2.0
// route: hidden states to choice and plan. Made of router_logits and biased_topk_and_plan.
#include <optional>
#include <tuple>

#include "torch/biased_topk.h"
#include "torch/box.h"
#include "torch/checks.h"
#include "torch/device.h"
#include "torch/router_logits.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

/// logits, then biased_topk_and_plan's results.
using RouteTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

RouteTensors route(const Tensor& hidden_states, const Tensor& weight, const std::optional<Tensor>& bias,
                   const RoutingArguments& routing, std::optional<DType> indices_dtype) {
  const RoutingSpec spec = routing.spec();
  check_device(weight, "weight", hidden_states, "hidden_states");
  if (bias) {
    check_device(*bias, "bias", hidden_states, "hidden_states");
    check_floating(*bias, "bias");
  }
  check_dims(hidden_states, "hidden_states", 2, "[tokens, hidden_size]");
  check_dims(weight, "weight", 2, "[experts, hidden_size]");
  const int64_t num_experts = weight.size(0);
  if (bias) {
    check_shape(*bias, "bias", {num_experts}, "[experts]");
  }
  static_cast<void>(spec.for_width(num_experts));  // before anything is computed
  const Tensor logits = router_logits(hidden_states, weight);
  return std::tuple_cat(std::make_tuple(logits),
                        biased_topk_and_plan(logits, bias, {routing, std::nullopt}, indices_dtype));
}

}  // namespace

ZEXPERT_OPERATORS(m) { m.impl("route", ZEXPERT_BOX(&route)); }

ZEXPERT_DEVICE_NAMESPACE_END
