// SPDX-License-Identifier: Apache-2.0
// Rows of tokens and weights of slots, gathered in the plan's order and scattered back.
#pragma once

#include "torch/device.h"
#include "torch/grouped_mlp.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN

/// [rows, hidden_size]: the rows of tokens [tokens, hidden_size] that inputs.row_slots names. Rows that do no work hold
/// anything.
Tensor gather_rows(const Tensor& tokens, const ExpertInputs& inputs);

/// [rows, 1]: the weights of topk_weights [tokens, top_k] that inputs.row_slots names. Rows that do no work hold
/// anything.
Tensor gather_row_weights(const Tensor& topk_weights, const ExpertInputs& inputs);

/// [tokens, top_k]: the values of row_weights, one for each row, that inputs.slot_rows names, 0 for a slot without a
/// row.
Tensor scatter_row_weights(const Tensor& row_weights, const ExpertInputs& inputs);

/// Sets rows that do no work to 0.
void zero_idle_rows(const Tensor& rows, const ExpertInputs& inputs);

ZEXPERT_DEVICE_NAMESPACE_END
