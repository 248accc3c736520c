// SPDX-License-Identifier: Apache-2.0
// biased_topk_backward: from the gradients of the routing weights to the gradient of the logits.
#pragma once

#include <cstdint>

#include "zexpert/cuda_stream.h"
#include "zexpert/routing_spec.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// The choice of experts is made again from the logits and the bias, exactly as biased_topk made it; it is a constant
/// of the differentiation, so the bias has no gradient. With s the scores, w the chosen experts' weights before
/// renormalisation (drop experts' 0 under drop_before_renormalize), S = sum w, v = w / S if renormalize (0 if S is 0),
/// else w, and f = routed_scaling_factor, a chosen expert's output is f * v; with g its upstream gradient,
///   dv = f * g            (g: grad_topk_weights[t, k] for a real expert, grad_zero_weight[t] for an identity expert,
///                          grad_constant_weight[t, c] for constant expert c, 0 for a drop expert)
///   dw = (dv - sum dv * v) / S if renormalize, else dv;   0 where w was made 0 and where S is 0
///   softmax:      grad_logits[i] = s[i] * (dw[i] - sum dw * s)       with dw[i] = 0 for an expert not chosen
///   sigmoid:      grad_logits[i] = dw[i] * s[i] * (1 - s[i])
///   sqrtsoftplus: grad_logits[i] = dw[i] * sigmoid(logits[i]) / (2 * s[i])
/// and 0 for a masked logit. Computed in float32 (float64 for float64 logits) and rounded once.
///
/// Pointers must not be null, except bias, and except every pointer when num_tokens is 0, and grad_constant_weight
/// when the spec has no constant experts. Strides count elements.
struct BiasedTopKBackwardParams {
  const void* grad_topk_weights = nullptr;     ///< [num_tokens, top_k]; float32, float64 for float64 logits; contiguous
  const void* grad_zero_weight = nullptr;      ///< [num_tokens]; type of grad_topk_weights; contiguous
  const void* grad_constant_weight = nullptr;  ///< [num_tokens, num_constant_experts]; likewise
  const void* logits = nullptr;                ///< [num_tokens, num_experts]; any floating type, unit inner stride
  ScalarType logits_type = ScalarType::kFloat32;
  int64_t logits_row_stride = 0;
  const void* bias = nullptr;  ///< [num_experts] or null, as biased_topk took it; any floating type, contiguous
  ScalarType bias_type = ScalarType::kFloat32;

  void* grad_logits = nullptr;  ///< [num_tokens, num_experts]; type of logits; contiguous

  int64_t num_tokens = 0;
  RoutingSpec spec;  ///< resolved by RoutingSpec::for_width: every count known
};

/// Throws Error, before anything is written, if num_tokens is negative or a pointer is missing.
void biased_topk_backward_cpu(const BiasedTopKBackwardParams& params);

/// The same on the current CUDA device, for what biased_topk_cuda takes; pointers are to its memory.
void biased_topk_backward_cuda(const BiasedTopKBackwardParams& params, cudaStream_t stream);

}  // namespace zexpert
