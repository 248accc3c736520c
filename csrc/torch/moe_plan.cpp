// SPDX-License-Identifier: Apache-2.0
#include "torch/moe_plan.h"

#include <torch/csrc/stable/library.h>

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

PlanTensors moe_plan_on_cpu(const Tensor& topk_ids, int64_t num_experts) {
  return moe_plan(topk_ids, num_experts, &moe_plan_cpu);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) { m.impl("moe_plan", TORCH_BOX(&moe_plan_on_cpu)); }

HIDDEN_NAMESPACE_END(zexpert, ops)
