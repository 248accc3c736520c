// SPDX-License-Identifier: Apache-2.0
// zero_expert_accumulate: the identity experts' part of a layer's output on its own, and its gradients. Both are cases
// of moe_finalize without slots.
#pragma once

#include <cstdint>

#include "zexpert/check_params.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/moe_finalize.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// out[t, h] = zero_weight[t] * hidden_states[t, h], added to the values in `out` if `accumulate`.
/// Computed in float32 (float64 for float64 data) and rounded once.
/// Strides count elements. All pointers are to memory of the device that computes.
struct ZeroExpertAccumulateParams {
  const void* hidden_states = nullptr;  ///< [num_tokens, hidden_size]; unit inner stride
  const void* zero_weight = nullptr;    ///< [num_tokens]; float32, or float64 for float64 data; contiguous
  void* out = nullptr;                  ///< [num_tokens, hidden_size]; type of hidden_states, unit inner stride
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_tokens = 0;
  int64_t hidden_size = 0;
  int64_t hidden_row_stride = 0;
  int64_t out_row_stride = 0;  ///< at least hidden_size
  bool accumulate = false;

  /// The same sum as moe_finalize names it. Throws Error for a negative size or a missing array.
  MoeFinalizeParams as_moe_finalize() const {
    detail::check_sizes({{"num_tokens", num_tokens}, {"hidden_size", hidden_size}});
    MoeFinalizeParams params;
    params.hidden_states = hidden_states;
    params.zero_weight = zero_weight;
    params.residual = accumulate ? out : nullptr;
    params.out = out;
    params.data_type = data_type;
    params.num_tokens = num_tokens;
    params.hidden_size = hidden_size;
    params.hidden_row_stride = hidden_row_stride;
    params.residual_row_stride = accumulate ? out_row_stride : 0;
    params.out_row_stride = out_row_stride;
    if (!params.is_empty()) {
      detail::check_pointers({{"hidden_states", hidden_states}, {"zero_weight", zero_weight}, {"out", out}});
    }
    return params;
  }
};

/// Throws Error, before anything is written, for params that are not valid.
inline void zero_expert_accumulate_cpu(const ZeroExpertAccumulateParams& params) {
  moe_finalize_cpu(params.as_moe_finalize());
}
inline void zero_expert_accumulate_cuda(const ZeroExpertAccumulateParams& params, cudaStream_t stream) {
  moe_finalize_cuda(params.as_moe_finalize(), stream);
}

/// For out[t] = zero_weight[t] * hidden_states[t]:
///   grad_hidden_states[t] = zero_weight[t] * grad_out[t]
///   grad_zero_weight[t]   = <grad_out[t], hidden_states[t]>
/// All identity experts of a token share that dot product. Computed in float32 (float64 for float64 data) and rounded
/// once.
/// Strides count elements. All pointers are to memory of the device that computes.
struct ZeroExpertAccumulateBackwardParams {
  const void* grad_out = nullptr;       ///< [num_tokens, hidden_size]; unit inner stride
  const void* hidden_states = nullptr;  ///< [num_tokens, hidden_size]; type of grad_out, unit inner stride
  const void* zero_weight = nullptr;    ///< [num_tokens]; weight type; contiguous; null without grad_hidden_states
  void* grad_hidden_states = nullptr;   ///< [num_tokens, hidden_size]; type of grad_out; null: not computed
  void* grad_zero_weight = nullptr;     ///< [num_tokens]; weight type: float32, float64 for float64; contiguous
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_tokens = 0;
  int64_t hidden_size = 0;
  int64_t grad_out_row_stride = 0;
  int64_t hidden_row_stride = 0;

  /// The same gradients as moe_finalize's backward names them.
  MoeFinalizeBackwardParams as_moe_finalize() const {
    MoeFinalizeBackwardParams params;
    params.grad_out = grad_out;
    params.hidden_states = hidden_states;
    params.zero_weight = zero_weight;
    params.grad_hidden_states = grad_hidden_states;
    params.grad_zero_weight = grad_zero_weight;
    params.data_type = data_type;
    params.num_tokens = num_tokens;
    params.hidden_size = hidden_size;
    params.grad_out_row_stride = grad_out_row_stride;
    params.hidden_row_stride = hidden_row_stride;
    return params;
  }
};

/// Throws Error, before anything is written, for params that are not valid.
inline void zero_expert_accumulate_backward_cpu(const ZeroExpertAccumulateBackwardParams& params) {
  moe_finalize_backward_cpu(params.as_moe_finalize());
}
inline void zero_expert_accumulate_backward_cuda(const ZeroExpertAccumulateBackwardParams& params,
                                                 cudaStream_t stream) {
  moe_finalize_backward_cuda(params.as_moe_finalize(), stream);
}

}  // namespace zexpert
