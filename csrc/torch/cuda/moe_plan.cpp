// SPDX-License-Identifier: Apache-2.0
#include "torch/moe_plan.h"

#include <torch/csrc/stable/library.h>

#include "torch/cuda/stream.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

PlanTensors moe_plan_on_cuda(const Tensor& topk_ids, int64_t num_experts) {
  const CurrentDevice device(topk_ids);
  return moe_plan(topk_ids, num_experts, [&](MoePlanParams params) {
    const int64_t workspace_bytes = moe_plan_cuda_workspace_bytes(params.num_slots, params.num_experts);
    const Tensor workspace = empty({workspace_bytes}, DType::Byte, topk_ids);
    params.workspace = workspace.mutable_data_ptr();
    moe_plan_cuda(params, device.stream());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CUDA, m) { m.impl("moe_plan", TORCH_BOX(&moe_plan_on_cuda)); }

HIDDEN_NAMESPACE_END(zexpert, ops)
