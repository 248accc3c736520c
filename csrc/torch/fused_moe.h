// SPDX-License-Identifier: Apache-2.0
// fused_moe and fused_moe_backward for tensors on any device: the arguments they share, and their checks.
#pragma once

#include <cstdint>

#include "torch/checks.h"
#include "torch/grouped_mlp.h"
#include "torch/tensor.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

struct FusedMoeTensors {
  const Tensor& hidden_states;
  const Tensor& topk_weights;
  const Tensor& zero_weight;
  const Tensor& expert_offsets;
  const Tensor& row_slots;
  const Tensor& slot_rows;
  const Tensor& w13_weight;
  const Tensor& w2_weight;
};

inline void check_fused_moe(const FusedMoeTensors& args) {
  const Tensor& hidden_states = args.hidden_states;
  const auto on_device = [&](const Tensor& tensor, const char* name) {
    check_device(tensor, name, hidden_states, "hidden_states");
  };
  on_device(args.topk_weights, "topk_weights");
  on_device(args.zero_weight, "zero_weight");
  on_device(args.row_slots, "row_slots");
  on_device(args.slot_rows, "slot_rows");
  check_grouped_mlp(hidden_states, args.expert_offsets, args.w13_weight, args.w2_weight, "hidden_states");
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
  check_shape(args.row_slots, "row_slots", {num_tokens * top_k}, "[tokens * top_k]");
  check_shape(args.slot_rows, "slot_rows", {num_tokens, top_k}, "[tokens, top_k]");
}

HIDDEN_NAMESPACE_END(zexpert, ops)
