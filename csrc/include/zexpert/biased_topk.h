// SPDX-License-Identifier: Apache-2.0
// biased_topk: top-k expert choice with a selection bias, groups and zero experts.
#pragma once

#include <cstdint>

#include "zexpert/cuda_stream.h"
#include "zexpert/routing_spec.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// Per token, computed in float32 (float64 for float64 logits):
///   score = scoring_func(logits); key = score + bias; choose the top_k largest keys, lower index first among equals;
///   weight = score of the chosen, renormalised as the spec says, times routed_scaling_factor.
/// A logit that is NaN or infinite, or a key that is NaN, is never chosen. With groups, a group's score is the sum of
/// its two largest keys and only real experts of the best topk_group groups are choosable; zero experts always are.
/// A slot that chose a zero expert, and a slot left empty for want of choosable experts, has id -1 and weight 0.
///
/// Pointers must not be null, except bias, and except every pointer when num_tokens is 0, and constant_weight when the
/// spec has no constant experts. Strides count elements.
struct BiasedTopKParams {
  const void* logits = nullptr;  ///< [num_tokens, num_experts]; any floating type, unit inner stride
  ScalarType logits_type = ScalarType::kFloat32;
  int64_t logits_row_stride = 0;
  const void* bias = nullptr;  ///< [num_experts] or null; any floating type, contiguous
  ScalarType bias_type = ScalarType::kFloat32;

  void* topk_weights = nullptr;  ///< [num_tokens, top_k]; float32, float64 for float64 logits; contiguous
  void* topk_ids = nullptr;      ///< [num_tokens, top_k]; int32 or int64; contiguous
  ScalarType ids_type = ScalarType::kInt32;
  void* zero_weight = nullptr;      ///< [num_tokens]; type of topk_weights: summed weight of identity slots
  void* constant_weight = nullptr;  ///< [num_tokens, num_constant_experts]; type of topk_weights; contiguous

  int64_t num_tokens = 0;
  RoutingSpec spec;  ///< resolved by RoutingSpec::for_width: every count known
};

/// What biased_topk_cuda's kernel for a row in a warp's registers takes; a block takes the rest.
inline constexpr int kMaxWarpExperts = 1024;
inline constexpr int kMaxWarpTopK = 32;

/// Throws Error, before anything is written, if the spec is not resolved or out of range, or a pointer is missing.
void biased_topk_cpu(const BiasedTopKParams& params);

/// The same on the current CUDA device, for float32, bfloat16 and float16 logits of at most 8192 experts; pointers are
/// to its memory. A row's results do not depend on the rows beside it.
void biased_topk_cuda(const BiasedTopKParams& params, cudaStream_t stream);

}  // namespace zexpert
