// SPDX-License-Identifier: Apache-2.0
// biased_topk: top-k expert choice with a selection bias, groups and zero experts; the plan of the choice; gradients.
#pragma once

#include <cstdint>

#include "zexpert/check_params.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/moe_plan.h"
#include "zexpert/routing_spec.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// A row stride: rows follow each other without gaps.
inline constexpr int64_t kDenseRows = -1;

/// What the forward and the backward route, and how.
struct RoutingInputs {
  const void* logits = nullptr;  ///< [num_tokens, num_experts]; any floating type, unit inner stride
  ScalarType logits_type = ScalarType::kFloat32;
  int64_t logits_row_stride = kDenseRows;  ///< in elements; 0: all tokens read the same row
  const void* bias = nullptr;              ///< [num_experts] or null; any floating type, contiguous
  ScalarType bias_type = ScalarType::kFloat32;
  const int32_t* choices = nullptr;  ///< [num_tokens, top_k], contiguous: the choice; null: it is made from the keys
  int64_t num_tokens = 0;
  RoutingSpec spec;  ///< resolved by RoutingSpec::for_width: every count known

  int64_t row_stride() const { return logits_row_stride == kDenseRows ? spec.num_logits : logits_row_stride; }

  /// Throws Error for a spec that is not valid or not resolved, a size out of range or a type that is not floating.
  void validate_inputs() const {
    spec.validate();
    ZEXPERT_CHECK(spec.num_logits != kFromLogits && spec.num_identity_experts != kFromLogits,
                  "spec must be resolved by RoutingSpec::for_width, got an open count of experts");
    detail::check_sizes({{"num_tokens", num_tokens}});
    ZEXPERT_CHECK(logits_row_stride >= kDenseRows, "logits_row_stride must not be negative, got ", logits_row_stride);
    detail::check_floating(logits_type);
    if (bias != nullptr) {
      detail::check_floating(bias_type);
    }
  }
};

/// Per token, computed in float32 (float64 for float64 logits):
///   score = scoring_func(logits); key = score + bias; choose the top_k largest keys, lower index first among equals;
///   weight = score of the chosen, renormalised as the spec says, times routed_scaling_factor.
/// A logit that is NaN or infinite, or a key that is NaN, is never chosen. With groups, a group's score is the sum of
/// its two largest keys and only real experts of the best topk_group groups are choosable; zero experts always are.
/// A slot that chose a zero expert has id -1 and weight 0. So has a slot that stays empty because too few experts can
/// be chosen.
///
/// With `choices`, slot k of token t has the expert choices[t, k], of all num_experts, or stays empty for -1. Bias and
/// groups are not used. A slot stays empty if the logit of its expert is masked. An expert that is out of range, or
/// repeated within a token, is an error on the CPU; on CUDA, where checking would wait for the device, the slot stays
/// empty (of repeated experts, the later slots).
///
/// With expert_offsets, row_slots and slot_rows it also writes the plan of topk_ids over the real experts (moe_plan.h).
///
/// Only expert_offsets must be given when num_tokens is 0. All pointers are to memory of the device that computes.
struct BiasedTopKParams : RoutingInputs {
  void* topk_weights = nullptr;  ///< [num_tokens, top_k]; float32, float64 for float64 logits; contiguous
  void* topk_ids = nullptr;      ///< [num_tokens, top_k]; int32 or int64; contiguous
  ScalarType ids_type = ScalarType::kInt32;
  void* zero_weight = nullptr;      ///< [num_tokens]; type of topk_weights: summed weight of identity slots
  void* constant_weight = nullptr;  ///< [num_tokens, num_constant_experts]; type of topk_weights; contiguous

  // The plan: all three, or none.
  int32_t* expert_offsets = nullptr;  ///< null, or [num_real_experts + 1]
  int32_t* row_slots = nullptr;       ///< null, or [num_tokens * top_k]
  int32_t* slot_rows = nullptr;       ///< null, or [num_tokens * top_k]
  void* workspace = nullptr;          ///< biased_topk_<device>_workspace_bytes(params), aligned to 4; null if that is 0

  bool has_plan() const { return expert_offsets != nullptr || row_slots != nullptr || slot_rows != nullptr; }

  /// The plan as moe_plan makes it.
  MoePlanParams plan() const {
    MoePlanParams params;
    params.topk_ids = topk_ids;
    params.ids_type = ids_type;
    params.expert_offsets = expert_offsets;
    params.row_slots = row_slots;
    params.slot_rows = slot_rows;
    params.workspace = workspace;
    params.num_slots = num_tokens * spec.top_k;
    params.num_experts = spec.num_real_experts;
    return params;
  }

  /// Throws Error for inputs that are not valid, ids that are neither int32 nor int64 or a missing array.
  void validate() const {
    validate_inputs();
    detail::check_index_type("topk_ids", ids_type);
    if (num_tokens > 0) {
      detail::check_pointers(
          {{"logits", logits}, {"topk_weights", topk_weights}, {"topk_ids", topk_ids}, {"zero_weight", zero_weight}});
      if (spec.num_constant_experts > 0) {
        detail::check_pointers({{"constant_weight", constant_weight}});
      }
    }
    if (has_plan()) {
      plan().validate();
    }
  }
};

/// Bytes of scratch that the caller provides, in memory of the device: none without a plan.
inline int64_t biased_topk_cpu_workspace_bytes(const BiasedTopKParams& params) {
  return params.has_plan() ? moe_plan_cpu_workspace_bytes(params.plan()) : 0;
}
inline int64_t biased_topk_cuda_workspace_bytes(const BiasedTopKParams& params) {
  return params.has_plan() ? moe_plan_cuda_workspace_bytes(params.plan()) : 0;
}

// Which kernels run on CUDA. The launch and kernel_plan both ask these functions.

/// The largest row that a warp routes in its registers. A block routes larger ones.
inline constexpr int kMaxWarpExperts = 1024;
inline constexpr int kMaxWarpTopK = 32;
constexpr bool fits_warp(int64_t num_experts, int64_t top_k) {
  return num_experts <= kMaxWarpExperts && top_k <= kMaxWarpTopK;
}

/// The most that one launch routes and plans.
inline constexpr int64_t kMaxPlannedTokens = 256;
inline constexpr int64_t kMaxPlannedSlots = 4096;  // a slot, and a row, fits 16 bits

/// Whether routing and plan are one launch for these sizes, on a GPU with this major number of its compute capability.
constexpr bool is_one_launch(int64_t compute_capability, int64_t num_tokens, int64_t num_experts, int64_t top_k) {
  return (compute_capability == 9 || compute_capability == 10) && num_tokens > 0 && num_tokens <= kMaxPlannedTokens &&
         fits_warp(num_experts, top_k) && num_tokens * top_k <= kMaxPlannedSlots;
}

/// Throws Error, before anything is written, for params that are not valid.
void biased_topk_cpu(const BiasedTopKParams& params);

/// The same on the current CUDA device, for float32, bfloat16 and float16 logits of at most 8192 experts. A row's
/// results do not depend on the other rows. The plan has the same bits as moe_plan_cuda's.
void biased_topk_cuda(const BiasedTopKParams& params, cudaStream_t stream);

/// The choice alone, zero experts by their own number: what RoutingInputs::choices accepts.
struct BiasedTopKChoicesParams : RoutingInputs {
  int32_t* chosen = nullptr;  ///< [num_tokens, top_k], contiguous: experts below num_experts, -1 for an empty slot

  /// Throws Error for inputs that are not valid or a missing array.
  void validate() const {
    validate_inputs();
    if (num_tokens > 0) {
      detail::check_pointers({{"logits", logits}, {"chosen", chosen}});
    }
  }
};

/// Throws Error, before anything is written, for params that are not valid; on CUDA also for what biased_topk_cuda does
/// not compute.
void biased_topk_choices_cpu(const BiasedTopKChoicesParams& params);
void biased_topk_choices_cuda(const BiasedTopKChoicesParams& params, cudaStream_t stream);

/// The choice of experts is that of `choices` or made again from the logits and the bias, exactly as biased_topk made
/// it; it is a constant of the differentiation, so the bias has no gradient. With s the scores, w the chosen experts'
/// weights before renormalisation (drop experts' 0 under drop_before_renormalize), S = sum w, v = w / S if renormalize
/// (0 if S is 0), else w, and f = routed_scaling_factor, a chosen expert's output is f * v; with g its upstream
/// gradient,
///   dv = f * g            (g: grad_topk_weights[t, k] for a real expert, grad_zero_weight[t] for an identity expert,
///                          grad_constant_weight[t, c] for constant expert c, 0 for a drop expert)
///   dw = (dv - sum dv * v) / S if renormalize, else dv;   0 where w was made 0 and where S is 0
///   softmax:      grad_logits[i] = s[i] * (dw[i] - sum dw * s)       with dw[i] = 0 for an expert not chosen
///   sigmoid:      grad_logits[i] = dw[i] * s[i] * (1 - s[i])
///   sqrtsoftplus: grad_logits[i] = dw[i] * sigmoid(logits[i]) / (2 * s[i])
/// and 0 for a masked logit. Computed in float32 (float64 for float64 logits) and rounded once.
///
/// No pointer needs to be given when num_tokens is 0. All pointers are to memory of the device that computes.
struct BiasedTopKBackwardParams : RoutingInputs {
  const void* grad_topk_weights = nullptr;     ///< [num_tokens, top_k]; float32, float64 for float64 logits; contiguous
  const void* grad_zero_weight = nullptr;      ///< [num_tokens]; type of grad_topk_weights; contiguous
  const void* grad_constant_weight = nullptr;  ///< [num_tokens, num_constant_experts]; likewise
  void* grad_logits = nullptr;                 ///< [num_tokens, num_experts]; type of logits; contiguous

  /// Throws Error for inputs that are not valid or a missing array.
  void validate() const {
    validate_inputs();
    if (num_tokens > 0) {
      detail::check_pointers({{"grad_topk_weights", grad_topk_weights},
                              {"grad_zero_weight", grad_zero_weight},
                              {"logits", logits},
                              {"grad_logits", grad_logits}});
      if (spec.num_constant_experts > 0) {
        detail::check_pointers({{"grad_constant_weight", grad_constant_weight}});
      }
    }
  }
};

/// Throws Error, before anything is written, for params that are not valid; on CUDA also for what biased_topk_cuda does
/// not compute.
void biased_topk_backward_cpu(const BiasedTopKBackwardParams& params);
void biased_topk_backward_cuda(const BiasedTopKBackwardParams& params, cudaStream_t stream);

}  // namespace zexpert
