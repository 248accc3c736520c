// SPDX-License-Identifier: Apache-2.0
// zero_expert_accumulate: the identity experts' part of a layer's output on its own.
#pragma once

#include <cstdint>

#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// out[t, h] = zero_weight[t] * hidden_states[t, h], added to what out held if `accumulate`.
/// Computed in float32 (float64 for float64 data) and rounded once.
/// Strides count elements.
struct ZeroExpertAccumulateParams {
  const void* hidden_states = nullptr;  ///< [num_tokens, hidden_size]; unit inner stride
  const void* zero_weight = nullptr;    ///< [num_tokens]; float32, or float64 for float64 data; contiguous
  void* out = nullptr;                  ///< [num_tokens, hidden_size]; type of hidden_states, unit inner stride
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_tokens = 0;
  int64_t hidden_size = 0;
  int64_t hidden_row_stride = 0;
  int64_t out_row_stride = 0;
  bool accumulate = false;
};

void zero_expert_accumulate_cpu(const ZeroExpertAccumulateParams& params);

/// The same on the current CUDA device; pointers are to its memory.
void zero_expert_accumulate_cuda(const ZeroExpertAccumulateParams& params, cudaStream_t stream);

}  // namespace zexpert
