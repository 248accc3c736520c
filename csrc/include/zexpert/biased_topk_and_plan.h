// SPDX-License-Identifier: Apache-2.0
// biased_topk_and_plan: biased_topk and the plan of its ids, on CUDA in one launch where tokens are few.
#pragma once

#include <cstdint>

#include "zexpert/biased_topk.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/moe_plan.h"

namespace zexpert {

struct BiasedTopKAndPlanParams {
  BiasedTopKParams routing;
  // As in MoePlanParams.
  int32_t* expert_offsets = nullptr;  ///< [num_real_experts + 1]
  int32_t* row_slots = nullptr;       ///< [num_tokens * top_k]
  int32_t* slot_rows = nullptr;       ///< [num_tokens * top_k]
  void* workspace = nullptr;          ///< CUDA: moe_plan_cuda_workspace_bytes of device memory; null if that is 0

  /// The plan of the routing's ids over its real experts.
  MoePlanParams plan() const {
    MoePlanParams params;
    params.topk_ids = routing.topk_ids;
    params.ids_type = routing.ids_type;
    params.expert_offsets = expert_offsets;
    params.row_slots = row_slots;
    params.slot_rows = slot_rows;
    params.num_slots = routing.num_tokens * routing.spec.top_k;
    params.num_experts = routing.spec.num_real_experts;
    params.workspace = workspace;
    return params;
  }
};

/// Writes what biased_topk_cpu(params.routing) and then moe_plan_cpu(params.plan()) write, and throws what they throw.
void biased_topk_and_plan_cpu(const BiasedTopKAndPlanParams& params);

/// Writes what biased_topk_cuda and then moe_plan_cuda write, bit for bit, and throws what they throw. On compute
/// capability 9 and 10 it is one launch for 1 to 256 tokens of at most 4096 slots, 1024 experts and a top_k of 32;
/// elsewhere it calls the two.
void biased_topk_and_plan_cuda(const BiasedTopKAndPlanParams& params, cudaStream_t stream);

}  // namespace zexpert
