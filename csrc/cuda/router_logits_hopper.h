// SPDX-License-Identifier: Apache-2.0
// router_logits on Hopper's matrix units, as router_logits.cu calls it.
#pragma once

#include <cstdint>

#include "cuda/router_logits_layout.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/router_logits.h"

namespace zexpert::cuda::router {

/// Where the kernels keep what they hand to the next one; null if there is nothing.
struct HopperWorkspace {
  float* partial_sums = nullptr;    ///< [kGroups, num_tokens, num_experts], for Mode::kSome
  void* parts = nullptr;            ///< [kParts, num_experts, hidden_size], float16; this and the next not for kFew
  float* inverse_scales = nullptr;  ///< [steps, expert tiles * kManyExperts]
  int* has_scales = nullptr;        ///< [expert tiles, steps]
};

/// Whether the current device and this library run the kernels.
bool runs_on_hopper();

/// Computes the logits, or with Mode::kSome the partial sums that are left to add.
void multiply_on_hopper(const RouterLogitsParams& params, Mode mode, const HopperWorkspace& workspace,
                        cudaStream_t stream);

}  // namespace zexpert::cuda::router
