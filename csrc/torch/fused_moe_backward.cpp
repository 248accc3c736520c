// SPDX-License-Identifier: Apache-2.0
// fused_moe_backward on the CPU. Rows of tokens are gathered again, expert by expert, and a routing weight's gradient
// is taken inside the expert: <grad_out @ w2, activation> is <grad_out, row>, so no row of the forward is wanted.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "torch/expert_products.h"
#include "torch/fused_moe.h"
#include "torch/moe_finalize.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

/// The layouts that the kernels take, in the place of arguments that have others.
struct DenseInputs {
  Tensor grad_out, gate_up, topk_weights;
};

void differentiate(const FusedMoeTensors& args, const DenseInputs& dense, const GroupedMlpNeeds& needs,
                   const Tensor& grad_topk_weights, const GroupedMlpGradients& gradients) {
  const GroupedMlpInputs inputs(args.hidden_states, args.expert_offsets, args.w13_weight, args.w2_weight,
                                {args.row_slots, args.topk_weights.size(1)});
  GroupedMlpBackwardParams params;
  params.forward = inputs.params;
  params.needs = needs;
  params.grad_out = dense.grad_out.const_data_ptr();
  params.grad_out_row_stride = dense.grad_out.stride(0);
  params.gate_up = dense.gate_up.const_data_ptr();
  params.gate_up_row_stride = dense.gate_up.stride(0);
  const SlotWeights weights{dense.topk_weights.const_data_ptr(), grad_topk_weights.mutable_data_ptr()};
  differentiate_experts(params, &weights, gradients);
}

/// grad_hidden_states[t] = the sum of the token's rows' gradients + zero_weight[t] * grad_out[t]: moe_finalize's
/// formula.
Tensor sum_rows(const FusedMoeTensors& args, const Tensor& grad_rows, const Tensor& grad_out) {
  const std::optional<Tensor> none;
  return on_cpu::moe_finalize({grad_rows, args.slot_rows, none, grad_out, args.zero_weight, none, none, none},
                              on_cpu::CurrentDevice(grad_out));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fused_moe_backward_on_cpu(
    const Tensor& grad_out, const Tensor& hidden_states, const Tensor& topk_weights, const Tensor& zero_weight,
    const Tensor& expert_offsets, const Tensor& row_slots, const Tensor& slot_rows, const Tensor& w13_weight,
    const Tensor& w2_weight, const Tensor& gate_up, bool needs_hidden_states, bool needs_w13_weight,
    bool needs_w2_weight) {
  const FusedMoeTensors args{hidden_states, topk_weights, zero_weight, expert_offsets,
                             row_slots,     slot_rows,    w13_weight,  w2_weight};
  check_device(grad_out, "grad_out", hidden_states, "hidden_states");
  check_device(gate_up, "gate_up", hidden_states, "hidden_states");
  check_fused_moe(args);
  const DType data = hidden_states.scalar_type();
  check_dtype(grad_out, "grad_out", data, hidden_states, "hidden_states");
  check_dtype(gate_up, "gate_up", data, hidden_states, "hidden_states");
  const int64_t num_tokens = hidden_states.size(0);
  const int64_t hidden = hidden_states.size(1);
  const int64_t num_slots = row_slots.size(0);
  const int64_t num_experts = w13_weight.size(0);
  const int64_t inner = w2_weight.size(2);
  check_shape(grad_out, "grad_out", {num_tokens, hidden}, "[tokens, hidden_size]");
  check_shape(gate_up, "gate_up", {num_slots, 2 * inner}, "[tokens * top_k, 2 * intermediate_size]");

  const GroupedMlpNeeds needs{needs_hidden_states, needs_w13_weight, needs_w2_weight};
  const GroupedMlpGradients gradients = empty_gradients(needs, num_slots, num_experts, hidden, inner, hidden_states);
  const Tensor grad_topk_weights = empty({num_tokens, topk_weights.size(1)}, topk_weights.scalar_type(), hidden_states);
  zero_rows(grad_topk_weights, 0, num_tokens);
  const Tensor grad_out_rows = with_unit_inner_stride(grad_out);
  if (num_tokens == 0 || hidden == 0 || inner == 0) {
    zero_gradients(gradients);
  } else {
    const DenseInputs dense{grad_out_rows, with_unit_inner_stride(gate_up), as_contiguous(topk_weights)};
    differentiate(args, dense, needs, grad_topk_weights, gradients);
  }
  const Tensor grad_hidden_states =
      needs_hidden_states ? sum_rows(args, gradients.rows, grad_out_rows) : gradients.rows;
  const Tensor grad_zero_weight =
      on_cpu::zero_weight_gradient(grad_out_rows, hidden_states, on_cpu::CurrentDevice(hidden_states));
  return {grad_hidden_states, grad_topk_weights, grad_zero_weight, gradients.w13_weight, gradients.w2_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) { m.impl("fused_moe_backward", TORCH_BOX(&fused_moe_backward_on_cpu)); }

HIDDEN_NAMESPACE_END(zexpert, ops)
