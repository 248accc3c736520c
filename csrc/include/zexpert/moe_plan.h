// SPDX-License-Identifier: Apache-2.0
// moe_plan: the stable counting sort of slots by expert that everything after routing follows.
#pragma once

#include <cstdint>

#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// Orders the slots that do work (id >= 0) by expert, slots of one expert in slot order. Row r of the order is slot
/// row_slots[r] (slot t * top_k + k); expert e's rows are expert_offsets[e] .. expert_offsets[e + 1] - 1.
/// slot_rows is the inverse, -1 for a slot that does no work; row_slots is -1 from the last offset on.
struct MoePlanParams {
  const void* topk_ids = nullptr;  ///< [num_slots]; contiguous; every id in [-1, num_experts)
  ScalarType ids_type = ScalarType::kInt32;
  int32_t* expert_offsets = nullptr;  ///< [num_experts + 1]
  int32_t* row_slots = nullptr;       ///< [num_slots]
  int32_t* slot_rows = nullptr;       ///< [num_slots]
  int64_t num_slots = 0;              ///< num_tokens * top_k, below 2^31
  int64_t num_experts = 0;            ///< real experts
  void* workspace = nullptr;          ///< CUDA: moe_plan_cuda_workspace_bytes of device memory; null if that is 0
};

/// Throws Error, before anything is written, if an id lies outside [-1, num_experts).
void moe_plan_cpu(const MoePlanParams& params);

/// Bytes of device memory that moe_plan_cuda works in, aligned to 4 bytes.
int64_t moe_plan_cuda_workspace_bytes(int64_t num_slots, int64_t num_experts);

/// The same on the current CUDA device, for at most 8192 experts; pointers are to its memory. Nothing waits for the
/// device, so ids are not checked: a slot whose id lies outside [0, num_experts) does no work.
void moe_plan_cuda(const MoePlanParams& params, cudaStream_t stream);

}  // namespace zexpert
