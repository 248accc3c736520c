// SPDX-License-Identifier: Apache-2.0
// router_logits as other operators of the same device call it.
#pragma once

#include "torch/device.h"
#include "torch/tensor.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN

/// Checks the tensors as the operator does; returns its result.
Tensor router_logits(const Tensor& hidden_states, const Tensor& weight);

ZEXPERT_DEVICE_NAMESPACE_END
