// SPDX-License-Identifier: Apache-2.0
// moe_plan: the stable counting sort of slots by expert that everything after routing follows.
#pragma once

#include <cstdint>
#include <limits>

#include "zexpert/check_params.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// Orders the slots that do work (id >= 0) by expert, slots of one expert in slot order. Row r of the order is slot
/// row_slots[r] (slot t * top_k + k); expert e's rows are expert_offsets[e] .. expert_offsets[e + 1] - 1.
/// slot_rows is the inverse, -1 for a slot that does no work; row_slots is -1 from the last offset on.
/// All pointers are to memory of the device that computes.
struct MoePlanParams {
  const void* topk_ids = nullptr;  ///< [num_slots]; contiguous; every id in [-1, num_experts)
  ScalarType ids_type = ScalarType::kInt32;
  int32_t* expert_offsets = nullptr;  ///< [num_experts + 1]
  int32_t* row_slots = nullptr;       ///< [num_slots]
  int32_t* slot_rows = nullptr;       ///< [num_slots]
  void* workspace = nullptr;          ///< moe_plan_<device>_workspace_bytes(params), aligned to 4; null if that is 0
  int64_t num_slots = 0;              ///< num_tokens * top_k, below 2^31
  int64_t num_experts = 0;            ///< real experts

  /// Throws Error for a size out of range, a missing array or ids that are neither int32 nor int64.
  void validate() const {
    detail::check_sizes({{"num_slots", num_slots}, {"num_experts", num_experts}});
    ZEXPERT_CHECK(num_slots <= std::numeric_limits<int32_t>::max(), "num_slots must be below 2^31, got ", num_slots);
    detail::check_index_type("topk_ids", ids_type);
    detail::check_pointers({{"expert_offsets", expert_offsets}});
    if (num_slots > 0) {
      detail::check_pointers({{"topk_ids", topk_ids}, {"row_slots", row_slots}, {"slot_rows", slot_rows}});
    }
  }
};

/// How many blocks plan the slots on CUDA. One block plans few slots: a second launch would cost more than it saves.
/// Every block reads the counts of all others, so their number is limited.
constexpr int64_t moe_plan_cuda_num_blocks(int64_t num_slots) {
  constexpr int64_t kMostSlotsOfOneBlock = 2048;
  constexpr int64_t kSlotsPerBlock = 1536;
  constexpr int64_t kMostBlocks = 128;
  if (num_slots <= kMostSlotsOfOneBlock) {
    return 1;
  }
  const int64_t num_blocks = (num_slots + kSlotsPerBlock - 1) / kSlotsPerBlock;
  return num_blocks < kMostBlocks ? num_blocks : kMostBlocks;
}

/// Bytes of scratch that the caller provides, in memory of the device. The CPU needs none.
inline int64_t moe_plan_cpu_workspace_bytes(const MoePlanParams& /*params*/) { return 0; }
inline int64_t moe_plan_cuda_workspace_bytes(const MoePlanParams& params) {
  const int64_t num_blocks = moe_plan_cuda_num_blocks(params.num_slots);
  return num_blocks == 1 ? 0 : num_blocks * params.num_experts * static_cast<int64_t>(sizeof(int32_t));
}

/// Throws Error, before anything is written, for params that are not valid and for an id outside [-1, num_experts).
void moe_plan_cpu(const MoePlanParams& params);

/// The same on the current CUDA device, for at most 8192 experts. It does not wait for the device, so it cannot check
/// ids: a slot with an id outside [0, num_experts) does no work.
void moe_plan_cuda(const MoePlanParams& params, cudaStream_t stream);

}  // namespace zexpert
