// SPDX-License-Identifier: Apache-2.0
// biased_topk_backward for tensors on any device: checks, output, parameters.
#pragma once

#include <optional>

#include "torch/biased_topk.h"
#include "torch/checks.h"
#include "torch/tensor.h"
#include "zexpert/biased_topk_backward.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// The gradients that arrive from downstream.
struct RoutingGradients {
  const Tensor& topk_weights;
  const Tensor& zero_weight;
  const Tensor& constant_weight;
};

/// Calls launch(params) unless there are no tokens; returns grad_logits.
template <typename Launch>
Tensor biased_topk_backward(const RoutingGradients& gradients, const Tensor& logits, const std::optional<Tensor>& bias,
                            const RoutingSpec& spec, const Launch& launch) {
  check_device(gradients.topk_weights, "grad_topk_weights", logits, "logits");
  check_device(gradients.zero_weight, "grad_zero_weight", logits, "logits");
  check_device(gradients.constant_weight, "grad_constant_weight", logits, "logits");
  if (bias) {
    check_device(*bias, "bias", logits, "logits");
  }
  check_floating(logits, "logits");
  const DType weights = weight_dtype(logits.scalar_type());
  check_dtype(gradients.topk_weights, "grad_topk_weights", weights, logits, "logits");
  check_dtype(gradients.zero_weight, "grad_zero_weight", weights, logits, "logits");
  check_dtype(gradients.constant_weight, "grad_constant_weight", weights, logits, "logits");
  if (bias) {
    check_floating(*bias, "bias");
  }
  check_dims(logits, "logits", 2, "[tokens, experts]");
  const int64_t num_tokens = logits.size(0);
  const int64_t num_experts = logits.size(1);
  BiasedTopKBackwardParams params;
  params.spec = spec.for_width(num_experts);
  check_shape(gradients.topk_weights, "grad_topk_weights", {num_tokens, spec.top_k}, "[tokens, top_k]");
  check_shape(gradients.zero_weight, "grad_zero_weight", {num_tokens}, "[tokens]");
  check_shape(gradients.constant_weight, "grad_constant_weight", {num_tokens, spec.num_constant_experts},
              "[tokens, constant_experts]");
  if (bias) {
    check_shape(*bias, "bias", {num_experts}, "[experts]");
  }

  const Tensor grad_logits = empty({num_tokens, num_experts}, logits.scalar_type(), logits);
  if (num_tokens > 0) {
    const Tensor grad_topk_weights = as_contiguous(gradients.topk_weights);
    const Tensor grad_zero_weight = as_contiguous(gradients.zero_weight);
    const Tensor grad_constant_weight = as_contiguous(gradients.constant_weight);
    const Tensor rows = with_unit_inner_stride(logits);
    params.grad_topk_weights = grad_topk_weights.const_data_ptr();
    params.grad_zero_weight = grad_zero_weight.const_data_ptr();
    params.grad_constant_weight = grad_constant_weight.const_data_ptr();
    params.logits = rows.const_data_ptr();
    params.logits_type = element_type(rows);
    params.logits_row_stride = rows.stride(0);
    std::optional<Tensor> dense_bias;
    if (bias) {
      dense_bias = as_contiguous(*bias);
      params.bias = dense_bias->const_data_ptr();
      params.bias_type = element_type(*dense_bias);
    }
    params.grad_logits = grad_logits.mutable_data_ptr();
    params.num_tokens = num_tokens;
    launch(params);
  }
  return grad_logits;
}

HIDDEN_NAMESPACE_END(zexpert, ops)
