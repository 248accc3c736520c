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

/// What one launch on CUDA takes at most.
inline constexpr int64_t kMaxPlannedTokens = 256;
inline constexpr int64_t kMaxPlannedSlots = 4096;  // a slot, and a row, fits 16 bits

/// Whether biased_topk_and_plan_cuda is one launch for these sizes, on a GPU whose compute capability has that major
/// number.
constexpr bool is_one_launch(int64_t compute_capability, int64_t num_tokens, int64_t num_experts, int64_t top_k) {
  return (compute_capability == 9 || compute_capability == 10) && num_tokens > 0 && num_tokens <= kMaxPlannedTokens &&
         num_experts <= kMaxWarpExperts && top_k <= kMaxWarpTopK && num_tokens * top_k <= kMaxPlannedSlots;
}

/// Writes what biased_topk_cpu(params.routing) and then moe_plan_cpu(params.plan()) write, and throws what they throw.
void biased_topk_and_plan_cpu(const BiasedTopKAndPlanParams& params);

/// Writes what biased_topk_cuda and then moe_plan_cuda write, bit for bit, and throws what they throw. Calls the two
/// where is_one_launch is false.
void biased_topk_and_plan_cuda(const BiasedTopKAndPlanParams& params, cudaStream_t stream);

}  // namespace zexpert
