// SPDX-License-Identifier: Apache-2.0
// The implementation "cpu" of the experts: zexpert's own kernel for experts with few rows, and PyTorch's matrix product
// for the others, one expert after another.
#pragma once

#include "torch/grouped_mlp.h"
#include "torch/tensor.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Writes `out` [rows, hidden_size]. Throws Error, before anything is written, if expert_offsets do not ascend from 0,
/// or an entry of row_slots is out of range.
void run_expert_by_expert(const ExpertInputs& inputs, const Tensor& out);

/// The same for training: every expert goes through PyTorch's product, and gate_up [rows, 2 * intermediate_size] is
/// kept.
void run_expert_by_expert_keeping_gate_up(const ExpertInputs& inputs, const Tensor& out, const Tensor& gate_up);

/// Writes the gradients that gradient_inputs.needs names, and those of topk_weights for slots that have a row. No size
/// may be 0. Throws Error as the forward does.
void differentiate_expert_by_expert(const ExpertInputs& inputs, const ExpertGradientInputs& gradient_inputs,
                                    const ExpertGradients& gradients);

HIDDEN_NAMESPACE_END(zexpert, ops)
