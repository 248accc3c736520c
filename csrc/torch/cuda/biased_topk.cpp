// SPDX-License-Identifier: Apache-2.0
#include "torch/biased_topk.h"

#include <torch/csrc/stable/library.h>

#include "torch/biased_topk_backward.h"
#include "torch/cuda/biased_topk.h"
#include "torch/cuda/stream.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

RoutingTensors biased_topk_on_cuda(const Tensor& logits, const std::optional<Tensor>& bias, int64_t top_k,
                                   int64_t num_real_experts, std::optional<int64_t> num_identity_experts,
                                   int64_t num_constant_experts, const std::string& scoring_func, bool renormalize,
                                   bool drop_before_renormalize, double routed_scaling_factor, int64_t num_expert_group,
                                   int64_t topk_group, std::optional<DType> indices_dtype) {
  check_logits_type(logits);
  const RoutingSpec spec =
      routing_spec(top_k, num_real_experts, num_identity_experts, num_constant_experts, scoring_func, renormalize,
                   drop_before_renormalize, routed_scaling_factor, num_expert_group, topk_group);
  const CurrentDevice device(logits);
  return biased_topk(logits, bias, spec, indices_dtype,
                     [&](const BiasedTopKParams& params, const Tensor&) { biased_topk_cuda(params, device.stream()); });
}

Tensor biased_topk_backward_on_cuda(const Tensor& grad_topk_weights, const Tensor& grad_zero_weight,
                                    const Tensor& grad_constant_weight, const Tensor& logits,
                                    const std::optional<Tensor>& bias, int64_t top_k, int64_t num_real_experts,
                                    std::optional<int64_t> num_identity_experts, int64_t num_constant_experts,
                                    const std::string& scoring_func, bool renormalize, bool drop_before_renormalize,
                                    double routed_scaling_factor, int64_t num_expert_group, int64_t topk_group) {
  check_logits_type(logits);
  const RoutingSpec spec =
      routing_spec(top_k, num_real_experts, num_identity_experts, num_constant_experts, scoring_func, renormalize,
                   drop_before_renormalize, routed_scaling_factor, num_expert_group, topk_group);
  const CurrentDevice device(logits);
  return biased_topk_backward(
      {grad_topk_weights, grad_zero_weight, grad_constant_weight}, logits, bias, spec,
      [&](const BiasedTopKBackwardParams& params) { biased_topk_backward_cuda(params, device.stream()); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CUDA, m) {
  m.impl("biased_topk", ZEXPERT_BOX(&biased_topk_on_cuda));
  m.impl("biased_topk_backward", ZEXPERT_BOX(&biased_topk_backward_on_cuda));
}

HIDDEN_NAMESPACE_END(zexpert, ops)
