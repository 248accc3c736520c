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

/// Runs every expert and keeps gate_up, whatever the sizes. Throws Error, before anything is written, if expert_offsets
/// do not ascend from 0, or an entry of row_slots is out of range.
void run_experts_keeping_gate_up(const GroupedMlpParams& params, const Tensor& gate_up);

/// The slots' weights, where the experts' results are weighted.
struct SlotWeights {
  const void* topk_weights = nullptr;  ///< [num_tokens, top_k]; weight type, contiguous
  void* grad_topk_weights = nullptr;   ///< [num_tokens, top_k]; weight type, contiguous; slots without a row are left
};

/// Fills the gradients that params.needs names, with zeros for rows and weights that no expert reaches. With `weights`,
/// which go with params.forward.row_slots, params.grad_out has a row per token as well, and is the gradient of the
/// weighted results. No size may be 0. Throws Error if expert_offsets do not ascend from 0, or an entry of row_slots is
/// out of range.
void differentiate_experts(const GroupedMlpBackwardParams& params, const SlotWeights* weights,
                           const GroupedMlpGradients& gradients);

HIDDEN_NAMESPACE_END(zexpert, ops)
