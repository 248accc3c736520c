// SPDX-License-Identifier: Apache-2.0
// zero_expert_accumulate_backward: gradients of the identity experts' part.
#pragma once

#include <cstdint>

#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// For out[t] = zero_weight[t] * hidden_states[t]:
///   grad_hidden_states[t] = zero_weight[t] * grad_out[t]
///   grad_zero_weight[t]   = <grad_out[t], hidden_states[t]>
/// However many identity experts a token chose, they share that one dot product. Computed in float32 (float64 for
/// float64 data) and rounded once.
/// Strides count elements.
struct ZeroExpertAccumulateBackwardParams {
  const void* grad_out = nullptr;       ///< [num_tokens, hidden_size]; unit inner stride
  const void* hidden_states = nullptr;  ///< [num_tokens, hidden_size]; type of grad_out, unit inner stride
  const void* zero_weight = nullptr;    ///< [num_tokens]; float32, or float64 for float64 data; contiguous
  void* grad_hidden_states = nullptr;   ///< [num_tokens, hidden_size]; type of grad_out, contiguous
  void* grad_zero_weight = nullptr;     ///< [num_tokens]; type of zero_weight, contiguous
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_tokens = 0;
  int64_t hidden_size = 0;
  int64_t grad_out_row_stride = 0;
  int64_t hidden_row_stride = 0;
};

void zero_expert_accumulate_backward_cpu(const ZeroExpertAccumulateBackwardParams& params);

/// The same on the current CUDA device; pointers are to its memory.
void zero_expert_accumulate_backward_cuda(const ZeroExpertAccumulateBackwardParams& params, cudaStream_t stream);

}  // namespace zexpert
