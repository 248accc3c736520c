// SPDX-License-Identifier: Apache-2.0
// fused_moe: tokens through the experts and the epilogue, and its gradients. The backward gathers tokens again. It
// computes a routing weight's gradient inside the expert, where <grad_out, row> is <grad_out @ w2, activation>, and so
// needs no row of the forward.
#include <optional>
#include <string>
#include <tuple>

#include "torch/box.h"
#include "torch/checks.h"
#include "torch/device.h"
#include "torch/experts.h"
#include "torch/grouped_mlp.h"
#include "torch/moe_finalize.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

/// What both directions are given.
struct FusedMoeTensors {
  const Tensor& hidden_states;
  const Tensor& topk_weights;
  const Tensor& zero_weight;
  const Tensor& expert_offsets;
  const Tensor& row_slots;
  const Tensor& slot_rows;
  const ExpertWeights& weights;

  ExpertRows rows() const { return {hidden_states, expert_offsets, row_slots, slot_rows, topk_weights.size(1)}; }
};

void check_fused_moe(const FusedMoeTensors& args) {
  const Tensor& hidden_states = args.hidden_states;
  const auto on_device = [&](const Tensor& tensor, const char* name) {
    check_device(tensor, name, hidden_states, "hidden_states");
  };
  on_device(args.topk_weights, "topk_weights");
  on_device(args.zero_weight, "zero_weight");
  on_device(args.row_slots, "row_slots");
  on_device(args.slot_rows, "slot_rows");
  check_grouped_mlp({hidden_states, args.expert_offsets, std::nullopt, std::nullopt, 1}, args.weights, "hidden_states");
  const DType weights = weight_dtype(hidden_states.scalar_type());
  check_dtype(args.topk_weights, "topk_weights", weights, hidden_states, "hidden_states");
  check_dtype(args.zero_weight, "zero_weight", weights, hidden_states, "hidden_states");
  check_dtype(args.row_slots, "row_slots", DType::Int);
  check_dtype(args.slot_rows, "slot_rows", DType::Int);
  check_dims(args.topk_weights, "topk_weights", 2, "[tokens, top_k]");
  const int64_t num_tokens = hidden_states.size(0);
  const int64_t top_k = args.topk_weights.size(1);
  ZEXPERT_CHECK(top_k >= 1, "topk_weights must have at least 1 column, got shape ", text(args.topk_weights.sizes()));
  check_shape(args.topk_weights, "topk_weights", {num_tokens, top_k}, "[tokens, top_k]");
  check_shape(args.zero_weight, "zero_weight", {num_tokens}, "[tokens]");
  check_dims(args.row_slots, "row_slots", 1, "[rows]");
  check_row_slots_size(args.row_slots, num_tokens, top_k);
  check_shape(args.slot_rows, "slot_rows", {num_tokens, top_k}, "[tokens, top_k]");
}

/// The rows that the epilogue may read. On the CPU these are the rows up to the last offset, so that a slot that names
/// another row is an error. On CUDA, where the host does not read the offsets, these are all rows.
Tensor working_rows(const Tensor& rows, const Tensor& expert_offsets) {
  if (kIsCuda) {
    return rows;
  }
  const int64_t num_rows = rows.size(0);
  const int64_t last_offset = *LastOffset(expert_offsets).pointer();
  ZEXPERT_CHECK(last_offset >= 0 && last_offset <= num_rows,
                "expert_offsets must end between 0 and the number of rows (", num_rows, "), got ", last_offset);
  Tensor all = rows;
  return torch::stable::narrow(all, 0, 0, last_offset);
}

std::tuple<Tensor, Tensor> fused_moe(const Tensor& hidden_states, const Tensor& topk_weights, const Tensor& zero_weight,
                                     const Tensor& expert_offsets, const Tensor& row_slots, const Tensor& slot_rows,
                                     const ExpertWeights& given_weights, const std::optional<Tensor>& residual,
                                     const std::optional<Tensor>& constant_weight,
                                     const std::optional<Tensor>& constant_vectors, const ExpertScales& scales,
                                     bool keep_gate_up, const std::string& implementation) {
  const CurrentDevice device(hidden_states);
  const ExpertWeights weights = given_weights.with(scales);
  const FusedMoeTensors args{hidden_states, topk_weights, zero_weight, expert_offsets, row_slots, slot_rows, weights};
  check_fused_moe(args);
  const auto task = keep_gate_up ? GroupedMlpTask::kForwardKeepingGateUp : GroupedMlpTask::kForward;
  const auto chosen = choose_implementation(implementation, hidden_states, weights, task);
  const ExpertResults results = run_experts(ExpertInputs(args.rows(), weights), chosen, keep_gate_up);
  const Tensor rows = working_rows(results.out, expert_offsets);
  const std::optional<Tensor> slot_weights = topk_weights;
  const Tensor out = moe_finalize(
      {rows, slot_rows, slot_weights, hidden_states, zero_weight, residual, constant_weight, constant_vectors}, device);
  return {out, results.gate_up};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_moe_backward(
    const Tensor& grad_out, const Tensor& hidden_states, const Tensor& topk_weights, const Tensor& zero_weight,
    const Tensor& expert_offsets, const Tensor& row_slots, const Tensor& slot_rows, const ExpertWeights& given_weights,
    const Tensor& gate_up, const ExpertScales& scales, bool needs_hidden_states, bool needs_w13_weight,
    bool needs_w2_weight, const std::string& implementation) {
  const CurrentDevice device(hidden_states);
  const ExpertWeights weights = given_weights.with(scales);
  const FusedMoeTensors args{hidden_states, topk_weights, zero_weight, expert_offsets, row_slots, slot_rows, weights};
  check_device(grad_out, "grad_out", hidden_states, "hidden_states");
  check_device(gate_up, "gate_up", hidden_states, "hidden_states");
  check_fused_moe(args);
  const DType data = hidden_states.scalar_type();
  check_dtype(grad_out, "grad_out", data, hidden_states, "hidden_states");
  check_dtype(gate_up, "gate_up", data, hidden_states, "hidden_states");
  check_shape(grad_out, "grad_out", {hidden_states.size(0), hidden_states.size(1)}, "[tokens, hidden_size]");
  check_dims(gate_up, "gate_up", 2, "[rows, 2 * intermediate_size]");
  const bool has_gate_up = gate_up.size(0) > 0;
  check_shape(gate_up, "gate_up", {has_gate_up ? row_slots.size(0) : 0, 2 * weights.intermediate_size()},
              "[rows, 2 * intermediate_size]");

  check_no_gradients_of_quantised(weights, needs_w13_weight, needs_w2_weight);
  const auto chosen = choose_implementation(implementation, hidden_states, weights, GroupedMlpTask::kBackward);
  ExpertGradientInputs gradient_inputs{with_unit_inner_stride(grad_out),
                                       std::nullopt,
                                       as_contiguous(topk_weights),
                                       {needs_hidden_states, needs_w13_weight, needs_w2_weight}};
  if (has_gate_up) {
    gradient_inputs.gate_up = with_unit_inner_stride(gate_up);
  }
  ExpertGradients gradients = differentiate_experts(ExpertInputs(args.rows(), weights), gradient_inputs, chosen);
  if (needs_hidden_states) {
    // A token's rows' gradients are summed, and the zero part's, zero_weight * grad_out, is added.
    const std::optional<Tensor> none;
    gradients.rows = moe_finalize(
        {gradients.rows, slot_rows, none, gradient_inputs.grad_out, zero_weight, none, none, none}, device);
  }
  const Tensor grad_zero_weight = zero_weight_gradient(gradient_inputs.grad_out, hidden_states, device);
  return {gradients.rows, gradients.topk_weights, grad_zero_weight, gradients.w13_weight, gradients.w2_weight};
}

}  // namespace

ZEXPERT_OPERATORS(m) {
  m.impl("fused_moe", ZEXPERT_BOX(&fused_moe));
  m.impl("fused_moe_backward", ZEXPERT_BOX(&fused_moe_backward));
}

ZEXPERT_DEVICE_NAMESPACE_END
