// SPDX-License-Identifier: Apache-2.0
// The experts' networks and their gradients, by whichever implementation a call chooses.
#pragma once

#include <string>

#include "torch/device.h"
#include "torch/grouped_mlp.h"
#include "torch/tensor.h"
#include "zexpert/grouped_mlp_choice.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN

/// The implementation for a call on the current device. Throws Error as choose_grouped_mlp does.
GroupedMlpImplementation choose_implementation(const std::string& requested, const Tensor& rows,
                                               const ExpertWeights& weights, GroupedMlpTask task);

struct ExpertResults {
  Tensor out;      ///< [rows, hidden_size]; rows that do no work hold anything
  Tensor gate_up;  ///< [rows, 2 * intermediate_size] if it is kept, else [0, 2 * intermediate_size]
};

/// Runs the experts on the current device. Where the host sees the offsets, throws Error if they do not ascend from 0
/// to at most the number of rows; on the CPU also if an entry of row_slots is out of range.
ExpertResults run_experts(const ExpertInputs& inputs, GroupedMlpImplementation implementation, bool keeps_gate_up);

/// The gradients that given.needs names; the others are empty. Throws Error as run_experts does.
ExpertGradients differentiate_experts(const ExpertInputs& inputs, const ExpertGradientInputs& given,
                                      GroupedMlpImplementation implementation);

#ifdef ZEXPERT_FOR_CUDA
/// grouped_mlp_cuda on rows in the plan's order, in tiles of at most `tile_rows` rows; 0 chooses.
void run_hopper_kernels(const ExpertInputs& inputs, const Tensor& out, int64_t tile_rows);
#endif

ZEXPERT_DEVICE_NAMESPACE_END
