// SPDX-License-Identifier: Apache-2.0
#include "torch/biased_topk_and_plan.h"

#include <torch/csrc/stable/library.h>

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

PlannedRoutingTensors biased_topk_and_plan_on_cpu(const Tensor& logits, const std::optional<Tensor>& bias,
                                                  int64_t top_k, int64_t num_real_experts,
                                                  std::optional<int64_t> num_identity_experts,
                                                  int64_t num_constant_experts, const std::string& scoring_func,
                                                  bool renormalize, bool drop_before_renormalize,
                                                  double routed_scaling_factor, int64_t num_expert_group,
                                                  int64_t topk_group, std::optional<DType> indices_dtype) {
  const RoutingSpec spec =
      routing_spec(top_k, num_real_experts, num_identity_experts, num_constant_experts, scoring_func, renormalize,
                   drop_before_renormalize, routed_scaling_factor, num_expert_group, topk_group);
  return biased_topk_and_plan(logits, bias, spec, indices_dtype, &biased_topk_and_plan_cpu);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) {
  m.impl("biased_topk_and_plan", ZEXPERT_BOX(&biased_topk_and_plan_on_cpu));
}

HIDDEN_NAMESPACE_END(zexpert, ops)
