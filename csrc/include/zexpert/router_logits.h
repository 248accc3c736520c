// SPDX-License-Identifier: Apache-2.0
// router_logits: the router's projection of hidden states, to float32's accuracy.
#pragma once

#include <cstdint>

#include "zexpert/check_params.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// logits[t, n] = sum_h hidden_states[t, h] * weight[n, h], as accurate as a sum in float32 (float64 for float64 data).
/// The order of a logit's additions does not depend on the other tokens or their number: neither do its bits.
/// Strides count elements. All pointers are to memory of the device that computes.
struct RouterLogitsParams {
  const void* hidden_states = nullptr;  ///< [num_tokens, hidden_size]; unit inner stride
  const void* weight = nullptr;         ///< [num_experts, hidden_size]; type of logits, unit inner stride
  void* logits = nullptr;               ///< [num_tokens, num_experts]; float32, float64 for float64 data; contiguous
  ScalarType data_type = ScalarType::kFloat32;  ///< of hidden_states
  int64_t num_tokens = 0;
  int64_t hidden_size = 0;
  int64_t num_experts = 0;
  int64_t hidden_row_stride = 0;
  int64_t weight_row_stride = 0;
  void* workspace = nullptr;  ///< of router_logits_*_workspace_bytes, aligned to 256 bytes; null if that is 0

  bool is_empty() const { return num_tokens == 0 || num_experts == 0; }

  /// Throws Error for a negative size, a missing array or a type that is not floating.
  void validate() const {
    detail::check_sizes({{"num_tokens", num_tokens}, {"hidden_size", hidden_size}, {"num_experts", num_experts}});
    detail::check_floating(data_type);
    if (!is_empty()) {
      detail::check_pointers({{"logits", logits}});
    }
    if (!is_empty() && hidden_size > 0) {
      detail::check_pointers({{"hidden_states", hidden_states}, {"weight", weight}});
    }
  }
};

/// Throws Error, before anything is written, for params that are not valid.
void router_logits_cpu(const RouterLogitsParams& params);
inline int64_t router_logits_cpu_workspace_bytes(const RouterLogitsParams& /*params*/) { return 0; }

/// Whether router_logits_cuda multiplies on the matrix units of the current device, a GPU of compute capability 9.0:
/// hidden states in bfloat16 or float16, hidden_size a multiple of 8, rows of both operands aligned to 16 bytes. The
/// order of additions is then another.
bool router_logits_uses_wgmma(const RouterLogitsParams& params);

/// The same on CUDA, where data_type must not be float64.
void router_logits_cuda(const RouterLogitsParams& params, cudaStream_t stream);
int64_t router_logits_cuda_workspace_bytes(const RouterLogitsParams& params);

}  // namespace zexpert
