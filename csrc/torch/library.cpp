// SPDX-License-Identifier: Apache-2.0
// The operator library: the schema of every operator, and PyTorch's thread pool for the CPU kernels. A C++ process that
// loads it has the operators of torch.ops.zexpert without Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "torch/routing_arguments.h"
#include "zexpert/parallel.h"

namespace {

void torch_pool(int64_t begin, int64_t end, int64_t grain_size, zexpert::ParallelBody body, void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain_size, body, context));
}

}  // namespace

STABLE_TORCH_LIBRARY(zexpert, m) {
  zexpert::set_parallel_for(&torch_pool);

  m.def("biased_topk(Tensor logits, Tensor? bias, " ZEXPERT_ROUTING_ARGUMENTS_WITH_CHOICES
        ", ScalarType? indices_dtype=None) "
        "-> (Tensor topk_weights, Tensor topk_ids, Tensor zero_weight, Tensor constant_weight)");
  m.def("biased_topk_and_plan(Tensor logits, Tensor? bias, " ZEXPERT_ROUTING_ARGUMENTS_WITH_CHOICES
        ", ScalarType? indices_dtype=None) "
        "-> (Tensor topk_weights, Tensor topk_ids, Tensor zero_weight, Tensor constant_weight, "
        "Tensor expert_offsets, Tensor row_slots, Tensor slot_rows)");
  m.def("biased_topk_choices(Tensor logits, Tensor? bias, " ZEXPERT_ROUTING_ARGUMENTS ") -> Tensor");
  m.def("router_logits(Tensor hidden_states, Tensor weight) -> Tensor");
  m.def("route(Tensor hidden_states, Tensor weight, Tensor? bias, " ZEXPERT_ROUTING_ARGUMENTS
        ", ScalarType? indices_dtype=None) "
        "-> (Tensor logits, Tensor topk_weights, Tensor topk_ids, Tensor zero_weight, Tensor constant_weight, "
        "Tensor expert_offsets, Tensor row_slots, Tensor slot_rows)");
  m.def("zero_expert_accumulate(Tensor hidden_states, Tensor zero_weight) -> Tensor");
  m.def("zero_expert_accumulate.out(Tensor hidden_states, Tensor zero_weight, *, Tensor(a!) out) -> ()");
  m.def(
      "moe_plan(Tensor topk_ids, int num_experts) "
      "-> (Tensor expert_offsets, Tensor row_slots, Tensor slot_rows)");
  m.def(
      "moe_permute(Tensor hidden_states, Tensor row_slots, Tensor expert_offsets, int top_k, Tensor? slot_rows=None) "
      "-> Tensor");
  m.def("silu_and_mul(Tensor gate_up, Tensor? expert_offsets=None) -> Tensor");
  m.def(
      "grouped_mlp(Tensor rows, Tensor expert_offsets, Tensor w13_weight, Tensor w2_weight, Tensor? row_slots=None, "
      "int top_k=1, Tensor? w13_scale_inv=None, Tensor? w2_scale_inv=None, *, str implementation=\"auto\") -> Tensor");
  m.def(
      "moe_finalize(Tensor rows, Tensor slot_rows, Tensor topk_weights, Tensor hidden_states, Tensor zero_weight, "
      "Tensor? residual=None, Tensor? constant_weight=None, Tensor? constant_vectors=None) -> Tensor");

  m.def("quantize_blockwise(Tensor weight) -> (Tensor weight, Tensor scale_inv)");
  m.def("dequantize_blockwise(Tensor weight, Tensor scale_inv, *, ScalarType dtype) -> Tensor");
  // Experts spread over ranks: the lists are the same tensor of each rank
  m.def(
      "moe_dispatch(Tensor hidden_states, Tensor topk_ids, Tensor topk_weights, Tensor(a!)[] rows, Tensor(b!)[] ids, "
      "Tensor(c!)[] weights, int rank, int num_local_experts, *, int most_multiprocessors=0) "
      "-> (Tensor slot_rows, Tensor row_tokens)");
  m.def(
      "moe_combine(Tensor rows, Tensor slot_rows, Tensor? topk_weights, Tensor(a!)[] out, int rank, *, "
      "int most_multiprocessors=0) -> ()");
  m.def(
      "rank_barrier(Tensor(a!)[] signals, Tensor(b!) epoch, Tensor(c!) validity, Tensor(d!) absent_rank, int rank, "
      "int timeout_ms) -> ()");

  // Training
  m.def(
      "biased_topk_backward(Tensor grad_topk_weights, Tensor grad_zero_weight, Tensor grad_constant_weight, "
      "Tensor logits, Tensor? bias, " ZEXPERT_ROUTING_ARGUMENTS_WITH_CHOICES ") -> Tensor grad_logits");
  m.def(
      "zero_expert_accumulate_backward(Tensor grad_out, Tensor hidden_states, Tensor zero_weight) "
      "-> (Tensor grad_hidden_states, Tensor grad_zero_weight)");
  m.def(
      "moe_permute_backward(Tensor grad_rows, Tensor row_slots, Tensor expert_offsets, SymInt num_tokens, int top_k, "
      "Tensor? slot_rows=None) -> Tensor grad_hidden_states");
  m.def("silu_and_mul_backward(Tensor grad_out, Tensor gate_up, Tensor? expert_offsets=None) -> Tensor grad_gate_up");
  m.def(
      "grouped_mlp_backward(Tensor grad_out, Tensor rows, Tensor expert_offsets, Tensor w13_weight, "
      "Tensor w2_weight, Tensor? gate_up, Tensor? w13_scale_inv=None, Tensor? w2_scale_inv=None, *, "
      "bool needs_rows=True, bool needs_w13_weight=True, bool needs_w2_weight=True, str implementation=\"auto\") "
      "-> (Tensor grad_rows, Tensor grad_w13_weight, Tensor grad_w2_weight)");
  m.def(
      "moe_finalize_backward(Tensor grad_out, Tensor rows, Tensor slot_rows, Tensor topk_weights, "
      "Tensor hidden_states, Tensor zero_weight) -> (Tensor grad_rows, Tensor grad_topk_weights, "
      "Tensor grad_hidden_states, Tensor grad_zero_weight)");
  m.def(
      "fused_moe(Tensor hidden_states, Tensor topk_weights, Tensor zero_weight, Tensor expert_offsets, "
      "Tensor row_slots, Tensor slot_rows, Tensor w13_weight, Tensor w2_weight, Tensor? residual=None, "
      "Tensor? constant_weight=None, Tensor? constant_vectors=None, Tensor? w13_scale_inv=None, "
      "Tensor? w2_scale_inv=None, *, bool keep_gate_up=True, str implementation=\"auto\") "
      "-> (Tensor out, Tensor gate_up)");
  m.def(
      "fused_moe_backward(Tensor grad_out, Tensor hidden_states, Tensor topk_weights, Tensor zero_weight, "
      "Tensor expert_offsets, Tensor row_slots, Tensor slot_rows, Tensor w13_weight, Tensor w2_weight, "
      "Tensor gate_up, Tensor? w13_scale_inv=None, Tensor? w2_scale_inv=None, *, bool needs_hidden_states=True, "
      "bool needs_w13_weight=True, bool needs_w2_weight=True, str implementation=\"auto\") "
      "-> (Tensor grad_hidden_states, Tensor grad_topk_weights, Tensor grad_zero_weight, "
      "Tensor grad_w13_weight, Tensor grad_w2_weight)");

  // Older names, kept for one release
  m.def(
      "grouped_mlp_hopper(Tensor rows, Tensor expert_offsets, Tensor w13_weight, Tensor w2_weight, *, "
      "int tile_rows=0) -> Tensor");
  m.def(
      "grouped_mlp_with_gate_up(Tensor rows, Tensor expert_offsets, Tensor w13_weight, Tensor w2_weight) "
      "-> (Tensor out, Tensor gate_up)");
  m.def("is_hopper(Tensor tensor) -> bool");
}
