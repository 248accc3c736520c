// SPDX-License-Identifier: Apache-2.0
// Experts on the CPU, one after another, through torch's matrix product: their networks and the networks' derivatives.
#pragma once

#include "torch/grouped_mlp.h"
#include "torch/grouped_mlp_backward.h"
#include "torch/tensor.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Runs every expert with more than min_rows rows. Row r of gate_up belongs to row r of params.rows if `keeps_gate_up`;
/// else gate_up is scratch with as many rows as the longest segment. No size may be 0.
void multiply_experts(const GroupedMlpParams& params, int64_t min_rows, const Tensor& gate_up, bool keeps_gate_up);

/// Runs every expert and keeps gate_up, whatever the sizes. Throws Error if expert_offsets do not ascend from 0.
void run_experts_keeping_gate_up(const GroupedMlpParams& params, const Tensor& gate_up);

/// How rows stand for slots, where they were gathered from tokens and their results are weighted.
struct RowsOfTokens {
  const int32_t* row_slots = nullptr;  ///< [num_rows]; row r is token row_slots[r] / top_k; in [0, num_tokens * top_k)
  const void* topk_weights = nullptr;  ///< [num_tokens, top_k]; weight type, contiguous
  void* grad_topk_weights = nullptr;   ///< [num_tokens, top_k]; weight type, contiguous; slots without a row are left
  int64_t num_tokens = 0;
  int64_t top_k = 0;
};

/// Fills the gradients that params.needs names, with zeros for rows and weights that no expert reaches. With `tokens`,
/// params.forward.rows and params.grad_out have a row per token, and grad_out is that of the weighted results. No size
/// may be 0. Throws Error if expert_offsets do not ascend from 0.
void differentiate_experts(const GroupedMlpBackwardParams& params, const RowsOfTokens* tokens,
                           const GroupedMlpGradients& gradients);

HIDDEN_NAMESPACE_END(zexpert, ops)
