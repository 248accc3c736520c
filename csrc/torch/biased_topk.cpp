// SPDX-License-Identifier: Apache-2.0
#include "zexpert/biased_topk.h"

#include <optional>
#include <tuple>

#include "torch/biased_topk.h"
#include "torch/box.h"
#include "torch/checks.h"
#include "torch/device.h"
#include "torch/moe_plan.h"
#include "torch/routing_arguments.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

/// topk_weights, topk_ids, zero_weight, constant_weight
using RoutingTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

/// CUDA has no kernels for float64 logits; the error comes before outputs are allocated.
void check_logits_type(const Tensor& logits) {
  ZEXPERT_CHECK(!kIsCuda || logits.scalar_type() != DType::Double,
                "logits must be float32, bfloat16 or float16 on CUDA, got float64");
}

/// The spec for the logits, once logits, bias and given choices have passed their checks.
RoutingSpec checked_spec(const Tensor& logits, const std::optional<Tensor>& bias, const std::optional<Tensor>& choices,
                         const RoutingSpec& spec) {
  if (bias) {
    check_device(*bias, "bias", logits, "logits");
  }
  if (choices) {
    check_device(*choices, "choices", logits, "logits");
  }
  check_floating(logits, "logits");
  if (bias) {
    check_floating(*bias, "bias");
  }
  if (choices) {
    check_dtype(*choices, "choices", DType::Int);
  }
  check_dims(logits, "logits", 2, "[tokens, experts]");
  if (bias) {
    check_shape(*bias, "bias", {logits.size(1)}, "[experts]");
  }
  const RoutingSpec resolved = spec.for_width(logits.size(1));
  if (choices) {
    check_shape(*choices, "choices", {logits.size(0), resolved.top_k}, "[tokens, top_k]");
  }
  return resolved;
}

/// Logits, bias and given choices in the layout of the kernels.
class InputTensors {
 public:
  InputTensors(const Tensor& logits, const std::optional<Tensor>& bias, const std::optional<Tensor>& choices)
      : logits_(with_unit_inner_stride(logits)) {
    if (bias) {
      bias_ = as_contiguous(*bias);
    }
    if (choices) {
      choices_ = as_contiguous(*choices);
    }
  }

  /// Makes params read them.
  void set(RoutingInputs& params) const {
    params.logits = logits_.const_data_ptr();
    params.logits_type = element_type(logits_);
    params.logits_row_stride = logits_.stride(0);
    params.num_tokens = logits_.size(0);
    if (bias_) {
      params.bias = bias_->const_data_ptr();
      params.bias_type = element_type(*bias_);
    }
    if (choices_) {
      params.choices = choices_->const_data_ptr<int32_t>();
    }
  }

 private:
  Tensor logits_;
  std::optional<Tensor> bias_;
  std::optional<Tensor> choices_;
};

/// Chooses, and makes the plan of the choice if `plan` is given.
RoutingTensors choose(const Tensor& logits, const std::optional<Tensor>& bias, const RoutingWithChoices& routing,
                      std::optional<DType> indices_dtype, std::optional<PlanTensors>* plan) {
  check_logits_type(logits);
  const RoutingSpec described = routing.arguments.spec();
  const CurrentDevice device(logits);
  const DType ids_dtype = indices_dtype.value_or(DType::Int);
  ZEXPERT_CHECK(ids_dtype == DType::Int || ids_dtype == DType::Long, "indices_dtype must be int32 or int64, got ",
                text(ids_dtype));
  BiasedTopKParams params;
  params.spec = checked_spec(logits, bias, routing.choices, described);
  const RoutingSpec& spec = params.spec;
  const int64_t num_tokens = logits.size(0);

  const DType weights = weight_dtype(logits.scalar_type());
  const Tensor topk_weights = empty({num_tokens, spec.top_k}, weights, logits);
  const Tensor topk_ids = empty({num_tokens, spec.top_k}, ids_dtype, logits);
  const Tensor zero_weight = empty({num_tokens}, weights, logits);
  const Tensor constant_weight = empty({num_tokens, spec.num_constant_experts}, weights, logits);
  if (plan != nullptr) {
    *plan = empty_plan(topk_ids, spec.num_real_experts);
    set_plan(params, **plan);
  }
  const InputTensors inputs(logits, bias, routing.choices);
  inputs.set(params);
  params.topk_weights = topk_weights.mutable_data_ptr();
  params.topk_ids = topk_ids.mutable_data_ptr();
  params.ids_type = element_type(topk_ids);
  params.zero_weight = zero_weight.mutable_data_ptr();
  params.constant_weight = constant_weight.mutable_data_ptr();
  const std::optional<Tensor> workspace = empty_workspace(ZEXPERT_WORKSPACE_BYTES(biased_topk, params), logits);
  params.workspace = workspace ? workspace->mutable_data_ptr() : nullptr;
  ZEXPERT_LAUNCH(biased_topk, params, device);
  return {topk_weights, topk_ids, zero_weight, constant_weight};
}

RoutingTensors biased_topk(const Tensor& logits, const std::optional<Tensor>& bias, const RoutingWithChoices& routing,
                           std::optional<DType> indices_dtype) {
  return choose(logits, bias, routing, indices_dtype, nullptr);
}

Tensor biased_topk_choices(const Tensor& logits, const std::optional<Tensor>& bias, const RoutingArguments& routing) {
  check_logits_type(logits);
  const RoutingSpec described = routing.spec();
  const CurrentDevice device(logits);
  BiasedTopKChoicesParams params;
  params.spec = checked_spec(logits, bias, std::nullopt, described);

  const Tensor chosen = empty({logits.size(0), params.spec.top_k}, DType::Int, logits);
  const InputTensors inputs(logits, bias, std::nullopt);
  inputs.set(params);
  params.chosen = chosen.mutable_data_ptr<int32_t>();
  ZEXPERT_LAUNCH(biased_topk_choices, params, device);
  return chosen;
}

Tensor biased_topk_backward(const Tensor& grad_topk_weights, const Tensor& grad_zero_weight,
                            const Tensor& grad_constant_weight, const Tensor& logits, const std::optional<Tensor>& bias,
                            const RoutingWithChoices& routing) {
  check_logits_type(logits);
  const RoutingSpec described = routing.arguments.spec();
  const CurrentDevice device(logits);
  check_device(grad_topk_weights, "grad_topk_weights", logits, "logits");
  check_device(grad_zero_weight, "grad_zero_weight", logits, "logits");
  check_device(grad_constant_weight, "grad_constant_weight", logits, "logits");
  check_floating(logits, "logits");
  const DType weights = weight_dtype(logits.scalar_type());
  check_dtype(grad_topk_weights, "grad_topk_weights", weights, logits, "logits");
  check_dtype(grad_zero_weight, "grad_zero_weight", weights, logits, "logits");
  check_dtype(grad_constant_weight, "grad_constant_weight", weights, logits, "logits");
  BiasedTopKBackwardParams params;
  params.spec = checked_spec(logits, bias, routing.choices, described);
  const RoutingSpec& spec = params.spec;
  const int64_t num_tokens = logits.size(0);
  const int64_t num_experts = logits.size(1);
  check_shape(grad_topk_weights, "grad_topk_weights", {num_tokens, spec.top_k}, "[tokens, top_k]");
  check_shape(grad_zero_weight, "grad_zero_weight", {num_tokens}, "[tokens]");
  check_shape(grad_constant_weight, "grad_constant_weight", {num_tokens, spec.num_constant_experts},
              "[tokens, constant_experts]");

  const Tensor grad_logits = empty({num_tokens, num_experts}, logits.scalar_type(), logits);
  const InputTensors inputs(logits, bias, routing.choices);
  inputs.set(params);
  const Tensor dense_grad_topk_weights = as_contiguous(grad_topk_weights);
  const Tensor dense_grad_zero_weight = as_contiguous(grad_zero_weight);
  const Tensor dense_grad_constant_weight = as_contiguous(grad_constant_weight);
  params.grad_topk_weights = dense_grad_topk_weights.const_data_ptr();
  params.grad_zero_weight = dense_grad_zero_weight.const_data_ptr();
  params.grad_constant_weight = dense_grad_constant_weight.const_data_ptr();
  params.grad_logits = grad_logits.mutable_data_ptr();
  ZEXPERT_LAUNCH(biased_topk_backward, params, device);
  return grad_logits;
}

}  // namespace

PlannedRoutingTensors biased_topk_and_plan(const Tensor& logits, const std::optional<Tensor>& bias,
                                           const RoutingWithChoices& routing, std::optional<DType> indices_dtype) {
  std::optional<PlanTensors> plan;
  const RoutingTensors outputs = choose(logits, bias, routing, indices_dtype, &plan);
  return std::tuple_cat(outputs, *plan);
}

ZEXPERT_OPERATORS(m) {
  m.impl("biased_topk", ZEXPERT_BOX(&biased_topk));
  m.impl("biased_topk_and_plan", ZEXPERT_BOX(&biased_topk_and_plan));
  m.impl("biased_topk_choices", ZEXPERT_BOX(&biased_topk_choices));
  m.impl("biased_topk_backward", ZEXPERT_BOX(&biased_topk_backward));
}

ZEXPERT_DEVICE_NAMESPACE_END
