// SPDX-License-Identifier: Apache-2.0
#include "torch/grouped_mlp.h"

#include <optional>
#include <string>
#include <tuple>

#include "torch/box.h"
#include "torch/device.h"
#include "torch/experts.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

Tensor grouped_mlp(const Tensor& rows, const Tensor& expert_offsets, const ExpertWeights& given_weights,
                   const std::optional<Tensor>& row_slots, int64_t top_k, const ExpertScales& scales,
                   const std::string& implementation) {
  const CurrentDevice device(rows);
  const ExpertWeights weights = given_weights.with(scales);
  const ExpertRows given{rows, expert_offsets, row_slots, std::nullopt, top_k};
  check_grouped_mlp(given, weights);
  const auto chosen = choose_implementation(implementation, rows, weights, GroupedMlpTask::kForward);
  return run_experts(ExpertInputs(given, weights), chosen, false).out;
}

std::tuple<Tensor, Tensor, Tensor> grouped_mlp_backward(
    const Tensor& grad_out, const Tensor& rows, const Tensor& expert_offsets, const ExpertWeights& given_weights,
    const std::optional<Tensor>& gate_up, const ExpertScales& scales, bool needs_rows, bool needs_w13_weight,
    bool needs_w2_weight, const std::string& implementation) {
  const CurrentDevice device(rows);
  const ExpertWeights weights = given_weights.with(scales);
  const ExpertRows given{rows, expert_offsets, std::nullopt, std::nullopt, 1};
  check_device(grad_out, "grad_out", rows, "rows");
  if (gate_up) {
    check_device(*gate_up, "gate_up", rows, "rows");
  }
  check_grouped_mlp(given, weights);
  check_dtype(grad_out, "grad_out", rows.scalar_type(), rows, "rows");
  if (gate_up) {
    check_dtype(*gate_up, "gate_up", rows.scalar_type(), rows, "rows");
  }
  check_shape(grad_out, "grad_out", {rows.size(0), rows.size(1)}, "[rows, hidden_size]");
  if (gate_up) {
    check_shape(*gate_up, "gate_up", {rows.size(0), 2 * weights.intermediate_size()}, "[rows, 2 * intermediate_size]");
  }

  check_no_gradients_of_quantised(weights, needs_w13_weight, needs_w2_weight);
  const auto chosen = choose_implementation(implementation, rows, weights, GroupedMlpTask::kBackward);
  ExpertGradientInputs gradient_inputs{
      with_unit_inner_stride(grad_out), std::nullopt, std::nullopt, {needs_rows, needs_w13_weight, needs_w2_weight}};
  if (gate_up) {
    gradient_inputs.gate_up = with_unit_inner_stride(*gate_up);
  }
  const ExpertGradients gradients = differentiate_experts(ExpertInputs(given, weights), gradient_inputs, chosen);
  return {gradients.rows, gradients.w13_weight, gradients.w2_weight};
}

// Aliases, kept for one release

std::tuple<Tensor, Tensor> grouped_mlp_with_gate_up(const Tensor& rows, const Tensor& expert_offsets,
                                                    const ExpertWeights& weights) {
  const CurrentDevice device(rows);
  const ExpertRows given{rows, expert_offsets, std::nullopt, std::nullopt, 1};
  check_grouped_mlp(given, weights);
  const auto chosen = choose_implementation("auto", rows, weights, GroupedMlpTask::kForwardKeepingGateUp);
  const ExpertResults results = run_experts(ExpertInputs(given, weights), chosen, true);
  return {results.out, results.gate_up};
}

#ifdef ZEXPERT_FOR_CUDA

Tensor grouped_mlp_hopper(const Tensor& rows, const Tensor& expert_offsets, const ExpertWeights& weights,
                          int64_t tile_rows) {
  const CurrentDevice device(rows);
  const ExpertRows given{rows, expert_offsets, std::nullopt, std::nullopt, 1};
  check_grouped_mlp(given, weights);
  const Tensor out = empty({rows.size(0), rows.size(1)}, rows.scalar_type(), rows);
  run_hopper_kernels(ExpertInputs(given, weights), out, tile_rows);
  return out;
}

bool is_hopper(const Tensor& tensor) {
  const CurrentDevice device(tensor);
  const GroupedMlpDevice properties = grouped_mlp_cuda_device();
  return properties.compute_capability == 90 && properties.has_hopper_code;
}

#else

bool is_hopper(const Tensor& /*tensor*/) { return false; }

#endif

}  // namespace

ZEXPERT_OPERATORS(m) {
  m.impl("grouped_mlp", ZEXPERT_BOX(&grouped_mlp));
  m.impl("grouped_mlp_backward", ZEXPERT_BOX(&grouped_mlp_backward));
  m.impl("grouped_mlp_with_gate_up", ZEXPERT_BOX(&grouped_mlp_with_gate_up));
  m.impl("is_hopper", ZEXPERT_BOX(&is_hopper));
#ifdef ZEXPERT_FOR_CUDA
  m.impl("grouped_mlp_hopper", ZEXPERT_BOX(&grouped_mlp_hopper));
#endif
}

ZEXPERT_DEVICE_NAMESPACE_END
