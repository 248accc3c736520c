// SPDX-License-Identifier: Apache-2.0
// What the routing kernels write for a row's choice: the routing, or the gradient of the logits.
#pragma once

#include <cstdint>

#include "cuda/biased_topk/common.cuh"

namespace zexpert::cuda {

/// Outputs of biased_topk; or, if `chosen` is not null, that of biased_topk_choices alone.
struct RoutingOutputs {
  float* topk_weights;
  void* topk_ids;
  float* zero_weight;
  float* constant_weight;
  bool ids_are_int64;
  int32_t* chosen;
};

/// Writes a token's outputs. The whole warp calls this. Each lane holds kSlots slots, so that each slot of the row is
/// held once.
template <int kSlots>
__device__ __forceinline__ void write_routing(const RoutingArguments& arguments, const RoutingOutputs& outputs,
                                              int64_t token, int lane, const Slot (&slots)[kSlots]) {
  if (outputs.chosen != nullptr) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      if (slots[s].is_of_row(arguments))
        outputs.chosen[token * arguments.top_k + slots[s].index] = slots[s].expert;
    }
    return;
  }
  float weights[kSlots];
#pragma unroll
  for (int s = 0; s < kSlots; ++s) weights[s] = slots[s].weight(arguments);
  if (arguments.renormalize) {
    float total = 0.0F;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) total += weights[s];
    total = warp_sum(total);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) weights[s] = total > 0.0F ? weights[s] / total : 0.0F;
  }

  float zero_weight = 0.0F;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    weights[s] *= arguments.routed_scaling_factor;
    const int expert = slots[s].expert;
    const bool is_real = expert < arguments.num_real_experts;
    if (!is_real && expert < arguments.first_constant)
      zero_weight += weights[s];
    if (slots[s].is_of_row(arguments)) {
      const int64_t slot = token * arguments.top_k + slots[s].index;
      const int id = is_real ? expert : -1;
      outputs.topk_weights[slot] = is_real ? weights[s] : 0.0F;
      if (outputs.ids_are_int64) {
        static_cast<int64_t*>(outputs.topk_ids)[slot] = id;
      } else {
        static_cast<int32_t*>(outputs.topk_ids)[slot] = id;
      }
    }
  }
  if (arguments.first_constant > arguments.num_real_experts)
    zero_weight = warp_sum(zero_weight);
  if (lane == 0)
    outputs.zero_weight[token] = zero_weight;

  const int num_constants = arguments.first_drop - arguments.first_constant;
  if (num_constants > 0) {
    float* constant_weight = outputs.constant_weight + token * num_constants;
    for (int c = lane; c < num_constants; c += kWarpSize) constant_weight[c] = 0.0F;
    __syncwarp();
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const int constant = slots[s].expert - arguments.first_constant;
      if (slots[s].is_of_row(arguments) && constant >= 0 && constant < num_constants) {
        constant_weight[constant] = weights[s];
      }
    }
  }
}

/// Gradients that biased_topk_backward reads, and the one it writes.
struct RoutingGradients {
  const float* topk_weights;
  const float* zero_weight;
  const float* constant_weight;
  void* logits;  // output; type of the logits, contiguous
};

/// The gradients of the chosen experts' logits, by the formulas of biased_topk.h. The gradient of every other expert is
/// -score times the returned sum. The whole warp calls this, with slots as for write_routing.
template <int kSlots>
__device__ __forceinline__ float slot_gradients(const RoutingArguments& arguments, const RoutingGradients& upstream,
                                                int64_t token, const Slot (&slots)[kSlots],
                                                float (&gradients)[kSlots]) {
  // float64, because gradients that are subtracted from each other lose digits.
  double of_weights[kSlots];
  double dot = 0.0;
  double total = 0.0;
  const int num_constants = arguments.first_drop - arguments.first_constant;
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    const int expert = slots[s].expert;
    float gradient = 0.0F;
    if (slots[s].is_of_row(arguments) && expert >= 0) {
      if (expert < arguments.num_real_experts) {
        gradient = upstream.topk_weights[token * arguments.top_k + slots[s].index];
      } else if (expert < arguments.first_constant) {
        gradient = upstream.zero_weight[token];
      } else if (expert < arguments.first_drop) {
        gradient = upstream.constant_weight[token * num_constants + expert - arguments.first_constant];
      }
    }
    const float weight = slots[s].weight(arguments);
    of_weights[s] = static_cast<double>(gradient) * static_cast<double>(arguments.routed_scaling_factor);
    dot += of_weights[s] * static_cast<double>(weight);
    total += static_cast<double>(weight);
  }
  dot = warp_sum(dot);
  if (arguments.renormalize) {
    total = warp_sum(total);
    dot = total > 0.0 ? dot / total : 0.0;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) of_weights[s] = total > 0.0 ? (of_weights[s] - dot) / total : 0.0;
    dot = 0.0;  // renormalised weights do not change when all scores are scaled alike
  }
  return visit_scoring_func(arguments.scoring_func, [&](auto scoring) {
    using Scoring = decltype(scoring);
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const float weight = slots[s].weight(arguments);
      if constexpr (Scoring::kIsSoftmax) {
        gradients[s] = static_cast<float>((of_weights[s] - dot) * static_cast<double>(weight));
      } else {
        const float slope = weight > 0.0F ? Scoring::slope(weight) : 0.0F;
        gradients[s] = static_cast<float>(of_weights[s] * static_cast<double>(slope));
      }
    }
    return Scoring::kIsSoftmax ? static_cast<float>(dot) : 0.0F;
  });
}

/// The gradient of an expert that was not chosen, from the sum that slot_gradients returned; not 0 for softmax alone.
template <bool kCareful>
__device__ __forceinline__ float spread_gradient(float sum, float logit, RowScale row) {
  return is_finite(logit) ? -sum * score_of<kCareful>(ScoringFunc::kSoftmax, logit, row) : 0.0F;
}

/// Overwrites the gradients of the chosen experts' logits.
template <typename Logit, int kSlots>
__device__ __forceinline__ void write_slot_gradients(const RoutingArguments& arguments, const Slot (&slots)[kSlots],
                                                     const float (&gradients)[kSlots], Logit* grad_row) {
#pragma unroll
  for (int s = 0; s < kSlots; ++s) {
    if (slots[s].is_of_row(arguments) && slots[s].expert >= 0)
      grad_row[slots[s].expert] = Computed<Logit>::to(gradients[s]);
  }
}

}  // namespace zexpert::cuda
