// SPDX-License-Identifier: Apache-2.0
// The routing kernel for up to 1024 experts and top_k up to 32: a warp per token, the whole row in registers, no
// barrier.
//
// The row is not sorted. The K-th largest of the 32 lanes' largest keys is a lower bound of the row's K-th key. The few
// keys that reach it (mean 15 of 768 for K = 12) become candidates, one per lane, and are ranked by counting. A row
// with more than 32 candidates (mass ties) is chosen in K exact rounds of argmax.
//
// A row is first routed as if no logit were masked. If its sum or one of the candidates shows a masked logit, the row
// is routed again, carefully. So masked logits cost nothing in rows that have none.
#pragma once

#include <cstdint>

#include "cuda/biased_topk/common.cuh"
#include "cuda/biased_topk/outputs.cuh"
#include "cuda/biased_topk/row.cuh"
#include "cuda/biased_topk/select.cuh"
#include "zexpert/biased_topk.h"

namespace zexpert::cuda {

inline constexpr int kWarpsPerBlock = 4;
/// So many warps hide the loads. A ninth block would leave too few registers for a row of 768.
inline constexpr int kBlocksPerMultiprocessor = 8;
static_assert(kMaxWarpTopK == kWarpSize, "a lane holds a slot");

template <bool kCareful, typename Layout, typename Logit>
__device__ __forceinline__ void finish_token(const RoutingArguments& arguments, const RoutingOutputs& outputs,
                                             int64_t token, int lane, Slot slot, RowScale) {
  const Slot slots[1] = {slot};
  write_routing(arguments, outputs, token, lane, slots);
}

template <bool kCareful, typename Layout, typename Logit>
__device__ __forceinline__ void finish_token(const RoutingArguments& arguments, const RoutingGradients& gradients,
                                             int64_t token, int lane, Slot slot, RowScale scale) {
  const Slot slots[1] = {slot};
  float slot_gradient[1];
  const float sum = slot_gradients(arguments, gradients, token, slots, slot_gradient);
  float values[Layout::kPerLane] = {};
  if (sum != 0.0F) {
    // Load the row again, from the cache: the registers hold keys now.
    const Logit* row = static_cast<const Logit*>(arguments.logits) + token * arguments.logits_row_stride;
    load_row<Layout>(row, arguments.logits_fit_vectors, arguments.num_experts, lane, values);
#pragma unroll
    for (float& value : values) value = spread_gradient<kCareful>(sum, value, scale);
  }
  Logit* grad_row = static_cast<Logit*>(gradients.logits) + token * arguments.num_experts;
  store_row<Layout>(grad_row, arguments.num_experts == Layout::kWidth, arguments.num_experts, lane, values);
  __syncwarp();
  write_slot_gradients(arguments, slots, slot_gradient, grad_row);
}

/// The expert given for a lane's slot, -1 if an earlier slot has it too. The whole warp calls this.
__device__ __forceinline__ int given_expert_once(const RoutingArguments& arguments, int64_t token, int lane) {
  const int expert = given_expert(arguments, token, lane);
  const unsigned holders = __match_any_sync(kFullMask, expert);
  return (holders & ((1U << lane) - 1U)) == 0 ? expert : -1;
}

/// Routes one token. A careful call is right for every row. Another call returns false, and writes nothing, if the row
/// needs a careful one. `row_keys` is the warp's shared memory for groups.
template <bool kCareful, typename Layout, typename Logit, typename Outputs>
__device__ __forceinline__ bool route_token(const RoutingArguments& arguments, const Outputs& outputs,
                                            const float* bias, int64_t token, int lane, WarpScratch scratch,
                                            float* row_keys) {
  constexpr int kPerLane = Layout::kPerLane;
  // Above this, the rounding of largest * log2(e) makes the softmax's terms wrong.
  constexpr float kLargestOrdinary = 16777216.0F;
  const Logit* row = static_cast<const Logit*>(arguments.logits) + token * arguments.logits_row_stride;
  float values[kPerLane];  // logits, then terms of the softmax or scores, then keys
  load_row<Layout>(row, arguments.logits_fit_vectors, arguments.num_experts, lane, values);
  unsigned masked = 0;
  if (kCareful) {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (!is_finite(values[i])) {
        values[i] = -INFINITY;
        masked |= 1U << i;
      }
    }
  }

  // Scores
  RowScale scale{0.0F, 1.0F};
  const bool is_right = visit_scoring_func(arguments.scoring_func, [&](auto scoring) {
    using Scoring = decltype(scoring);
    if constexpr (Scoring::kIsSoftmax) {
      float largest = values[0];
#pragma unroll
      for (int i = 1; i < kPerLane; ++i) largest = fmaxf(largest, values[i]);
      scale.largest = warp_max(largest);
      float sum = 0.0F;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        values[i] = Scoring::template term<kCareful>(values[i], scale.largest);
        sum = __fadd_rn(sum, values[i]);
      }
      sum = warp_sum(sum);
      if (!kCareful && (!(fabsf(scale.largest) < kLargestOrdinary) || isnan(sum)))
        return false;
      scale.inverse = reciprocal(sum);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) values[i] = __fmul_rn(values[i], scale.inverse);
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) values[i] = Scoring::score(values[i]);
    }
    return true;
  });
  if (!is_right)
    return false;

  Slot slot{lane, -1, 0.0F};
  bool few = false;  // the lanes hold candidates, which are to be ranked
  int num_candidates = 0;
  if (arguments.choices != nullptr) {
    slot.expert = given_expert_once(arguments, token, lane);
  } else {
    // Keys
    if (bias != nullptr)
      add_vectors<Layout>(bias, lane, values);
    if (kCareful) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        if ((masked >> i & 1U) != 0)
          values[i] = NAN;
      }
      if (arguments.topk_group < arguments.num_expert_group)
        mask_groups<Layout>(arguments, lane, row_keys, values);
    }

    // Candidates. If fewer than top_k lanes have a key that can be chosen, the bound is -inf and no key reaches it.
    float largest_key = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) largest_key = fmaxf(largest_key, values[i]);
    const float bound = __shfl_sync(kFullMask, warp_sort_descending(largest_key, lane), arguments.top_k - 1);
    const float just_below = from_ordered_bits(ordered_bits(bound) - 1);
    unsigned reached = 0;
#pragma unroll
    for (int i = kPerLane - 1; i >= 0; --i) reached = push_less(reached, just_below, values[i]);
    const int num_reached = __popc(reached);
    const int num_until = warp_inclusive_sum(num_reached);
    num_candidates = __shfl_sync(kFullMask, num_until, kWarpSize - 1);

    few = num_candidates >= arguments.top_k && num_candidates <= kMaxCandidates;
    if (__builtin_expect(few, 1)) {
      slot.expert = take_candidate<Layout>(reached, num_until - num_reached, num_candidates, lane, scratch);
    } else {
      slot.expert = choose_in_rounds<Layout>(arguments.top_k, lane, values);
    }
  }
  float key = NAN;
  bool is_unsure = false;
  if (slot.expert >= 0) {
    const float logit = to_float(row[slot.expert]);
    is_unsure = !is_finite(logit);
    slot.score = score_of<kCareful>(arguments.scoring_func, logit, scale);
    key = bias == nullptr ? slot.score : __fadd_rn(slot.score, bias[slot.expert]);
  }
  if (!kCareful && __any_sync(kFullMask, is_unsure))
    return false;
  if (kCareful && is_unsure)
    slot.expert = -1;  // given, but masked
  if (__builtin_expect(few, 1)) {
    const int rank = rank_candidate(key, slot.expert, num_candidates, lane, scratch);
    if (lane < num_candidates)
      slot.index = rank;
  }
  finish_token<kCareful, Layout, Logit>(arguments, outputs, token, lane, slot, scale);
  return true;
}

template <typename Logit, int kWidth, typename Outputs>
__global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize, kBlocksPerMultiprocessor)
    biased_topk_warp(const RoutingArguments arguments, const Outputs outputs) {
  using Layout = RowLayout<Logit, kWidth>;
  __shared__ float4 scratch_memory[kWarpsPerBlock][WarpScratch::kBytes / sizeof(float4)];
  // A converted bias; with groups, for each warp, the row's keys and the groups' scores.
  extern __shared__ float4 dynamic_memory[];
  wait_for_previous_kernels();
  let_next_kernel_start();

  const auto lane = static_cast<int>(threadIdx.x % kWarpSize);
  const unsigned warp = threadIdx.x / kWarpSize;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + warp;
  auto* dynamic_floats = reinterpret_cast<float*>(dynamic_memory);
  const float* bias = prepare_bias(arguments, kWidth, dynamic_floats);
  if (token >= arguments.num_tokens)
    return;

  const WarpScratch scratch(scratch_memory[warp]);
  if (arguments.num_experts == kWidth && arguments.topk_group == arguments.num_expert_group) {
    if (__builtin_expect(route_token<false, Layout, Logit>(arguments, outputs, bias, token, lane, scratch, nullptr), 1))
      return;
    __syncwarp();
  }
  float* row_keys =
      dynamic_floats + kWidth + static_cast<int>(warp) * (arguments.num_experts + arguments.num_expert_group);
  route_token<true, Layout, Logit>(arguments, outputs, bias, token, lane, scratch, row_keys);
}

/// Floats of dynamic shared memory that the warps of a block need.
inline int64_t routing_memory_floats(const RoutingArguments& arguments, int width, int64_t num_warps) {
  const bool has_groups = arguments.topk_group < arguments.num_expert_group;
  const bool converts_bias = arguments.bias != nullptr && !arguments.bias_fits_vectors;
  const int64_t floats = converts_bias || has_groups ? width : 0;
  return has_groups ? floats + num_warps * (arguments.num_experts + arguments.num_expert_group) : floats;
}

template <typename Logit, int kWidth, typename Outputs>
void launch_biased_topk_warp(const RoutingArguments& arguments, const Outputs& outputs, cudaStream_t stream) {
  launch("biased_topk", &biased_topk_warp<Logit, kWidth, Outputs>,
         (arguments.num_tokens + kWarpsPerBlock - 1) / kWarpsPerBlock, kWarpsPerBlock * kWarpSize,
         sizeof(float) * static_cast<size_t>(routing_memory_floats(arguments, kWidth, kWarpsPerBlock)), stream,
         arguments, outputs);
}

}  // namespace zexpert::cuda
