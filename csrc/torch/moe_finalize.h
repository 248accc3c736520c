// SPDX-License-Identifier: Apache-2.0
// moe_finalize as other operators of the same device call it.
#pragma once

#include <optional>

#include "torch/device.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN

struct MoeFinalizeTensors {
  const Tensor& rows;
  const Tensor& slot_rows;
  const std::optional<Tensor>& topk_weights;  ///< None: every weight is 1
  const Tensor& hidden_states;
  const Tensor& zero_weight;
  const std::optional<Tensor>& residual;
  const std::optional<Tensor>& constant_weight;
  const std::optional<Tensor>& constant_vectors;
};

/// Checks the tensors as the operator does; returns its result.
Tensor moe_finalize(const MoeFinalizeTensors& args, const CurrentDevice& device);

/// The gradient of zero_weight alone: <grad_out[t], hidden_states[t]>, in the weight type. Both tensors are
/// [tokens, hidden_size], of one type and device.
Tensor zero_weight_gradient(const Tensor& grad_out, const Tensor& hidden_states, const CurrentDevice& device);

ZEXPERT_DEVICE_NAMESPACE_END
