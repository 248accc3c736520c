// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_plan.h"

#include <optional>

#include "torch/box.h"
#include "torch/checks.h"
#include "torch/device.h"
#include "torch/moe_plan.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

PlanTensors moe_plan(const Tensor& topk_ids, int64_t num_experts) {
  const CurrentDevice device(topk_ids);
  check_memory(topk_ids, "topk_ids");
  const DType ids_dtype = topk_ids.scalar_type();
  ZEXPERT_CHECK(ids_dtype == DType::Int || ids_dtype == DType::Long, "topk_ids must be int32 or int64, got ",
                text(ids_dtype));
  check_dims(topk_ids, "topk_ids", 2, "[tokens, top_k]");

  const PlanTensors plan = empty_plan(topk_ids, num_experts);
  const Tensor ids = as_contiguous(topk_ids);
  MoePlanParams params;
  params.topk_ids = ids.const_data_ptr();
  params.ids_type = element_type(ids);
  set_plan(params, plan);
  params.num_slots = ids.numel();
  params.num_experts = num_experts;
  const std::optional<Tensor> workspace = empty_workspace(ZEXPERT_WORKSPACE_BYTES(moe_plan, params), topk_ids);
  params.workspace = workspace ? workspace->mutable_data_ptr() : nullptr;
  ZEXPERT_LAUNCH(moe_plan, params, device);
  return plan;
}

}  // namespace

ZEXPERT_OPERATORS(m) { m.impl("moe_plan", ZEXPERT_BOX(&moe_plan)); }

ZEXPERT_DEVICE_NAMESPACE_END
