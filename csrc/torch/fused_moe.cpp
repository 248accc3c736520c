// SPDX-License-Identifier: Apache-2.0
// fused_moe on the CPU: permutation, experts and epilogue in one op, so that a backward of its own can do with less
// than theirs need.
#include "torch/fused_moe.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "torch/expert_products.h"
#include "torch/moe_finalize.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

std::tuple<Tensor, Tensor> run_experts(const FusedMoeTensors& args) {
  auto [results, gate_up] =
      grouped_mlp_with_gate_up(args.hidden_states, args.expert_offsets, args.w13_weight, args.w2_weight,
                               &run_experts_keeping_gate_up, {args.row_slots, args.topk_weights.size(1)});
  // What lies past the last offset has no values: the epilogue takes a slot that names it for the error it is. Without
  // tokens nothing has looked at the offsets yet.
  const int64_t num_rows = last_offset(as_contiguous(args.expert_offsets), results.size(0));
  return {torch::stable::narrow(results, 0, 0, num_rows), gate_up};
}

std::tuple<Tensor, Tensor> fused_moe_on_cpu(const Tensor& hidden_states, const Tensor& topk_weights,
                                            const Tensor& zero_weight, const Tensor& expert_offsets,
                                            const Tensor& row_slots, const Tensor& slot_rows, const Tensor& w13_weight,
                                            const Tensor& w2_weight, const std::optional<Tensor>& residual,
                                            const std::optional<Tensor>& constant_weight,
                                            const std::optional<Tensor>& constant_vectors) {
  const FusedMoeTensors args{hidden_states, topk_weights, zero_weight, expert_offsets,
                             row_slots,     slot_rows,    w13_weight,  w2_weight};
  check_fused_moe(args);
  const auto [rows, gate_up] = run_experts(args);
  const Tensor out = on_cpu::moe_finalize(
      {rows, slot_rows, topk_weights, hidden_states, zero_weight, residual, constant_weight, constant_vectors},
      on_cpu::CurrentDevice(hidden_states));
  return {out, gate_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) { m.impl("fused_moe", TORCH_BOX(&fused_moe_on_cpu)); }

HIDDEN_NAMESPACE_END(zexpert, ops)
