// SPDX-License-Identifier: Apache-2.0
// biased_topk for tensors on any device: checks, outputs, parameters. What differs between devices is the launch.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "torch/box.h"
#include "torch/checks.h"
#include "torch/tensor.h"
#include "zexpert/biased_topk.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// topk_weights, topk_ids, zero_weight, constant_weight
using RoutingTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

/// Calls launch(params, topk_ids) unless there are no tokens.
template <typename Launch>
RoutingTensors biased_topk(const Tensor& logits, const std::optional<Tensor>& bias, const RoutingSpec& spec,
                           std::optional<DType> indices_dtype, const Launch& launch) {
  if (bias) {
    check_device(*bias, "bias", logits, "logits");
  }
  check_floating(logits, "logits");
  if (bias) {
    check_floating(*bias, "bias");
  }
  const DType ids_dtype = indices_dtype.value_or(DType::Int);
  ZEXPERT_CHECK(ids_dtype == DType::Int || ids_dtype == DType::Long, "indices_dtype must be int32 or int64, got ",
                text(ids_dtype));
  check_dims(logits, "logits", 2, "[tokens, experts]");
  const int64_t num_tokens = logits.size(0);
  const int64_t num_experts = logits.size(1);
  if (bias) {
    check_shape(*bias, "bias", {num_experts}, "[experts]");
  }

  BiasedTopKParams params;
  params.spec = spec.for_width(num_experts);
  params.num_tokens = num_tokens;

  const DType weights = weight_dtype(logits.scalar_type());
  const Tensor topk_weights = empty({num_tokens, spec.top_k}, weights, logits);
  const Tensor topk_ids = empty({num_tokens, spec.top_k}, ids_dtype, logits);
  const Tensor zero_weight = empty({num_tokens}, weights, logits);
  const Tensor constant_weight = empty({num_tokens, spec.num_constant_experts}, weights, logits);
  if (num_tokens > 0) {
    const Tensor rows = with_unit_inner_stride(logits);
    params.logits = rows.const_data_ptr();
    params.logits_type = element_type(rows);
    params.logits_row_stride = rows.stride(0);
    const Tensor dense_bias = bias ? as_contiguous(*bias) : rows;
    if (bias) {
      params.bias = dense_bias.const_data_ptr();
      params.bias_type = element_type(dense_bias);
    }
    params.topk_weights = topk_weights.mutable_data_ptr();
    params.topk_ids = topk_ids.mutable_data_ptr();
    params.ids_type = element_type(topk_ids);
    params.zero_weight = zero_weight.mutable_data_ptr();
    params.constant_weight = constant_weight.mutable_data_ptr();
    launch(params, topk_ids);
  }
  return {topk_weights, topk_ids, zero_weight, constant_weight};
}

/// The spec that the op's arguments describe; the width of the logits is still open.
inline RoutingSpec routing_spec(int64_t top_k, int64_t num_real_experts, std::optional<int64_t> num_identity_experts,
                                int64_t num_constant_experts, const std::string& scoring_func, bool renormalize,
                                bool drop_before_renormalize, double routed_scaling_factor, int64_t num_expert_group,
                                int64_t topk_group) {
  ZEXPERT_CHECK(!num_identity_experts || *num_identity_experts >= 0, "num_identity_experts must not be negative, got ",
                *num_identity_experts);
  RoutingSpec spec;
  spec.top_k = top_k;
  spec.num_real_experts = num_real_experts;
  spec.num_identity_experts = num_identity_experts.value_or(kFromLogits);
  spec.num_constant_experts = num_constant_experts;
  spec.scoring_func = parse_scoring_func(scoring_func);
  spec.renormalize = renormalize;
  spec.drop_before_renormalize = drop_before_renormalize;
  spec.routed_scaling_factor = routed_scaling_factor;
  spec.num_expert_group = num_expert_group;
  spec.topk_group = topk_group;
  return spec;
}

HIDDEN_NAMESPACE_END(zexpert, ops)
