// SPDX-License-Identifier: Apache-2.0
// moe_finalize for tensors on any device: checks, output, parameters.
#pragma once

#include <cstdint>
#include <limits>
#include <optional>

#include "torch/checks.h"
#include "torch/tensor.h"
#include "zexpert/moe_finalize.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// The op's arguments, named once for the checks and the parameters.
struct MoeFinalizeTensors {
  const Tensor& rows;
  const Tensor& slot_rows;
  const Tensor& topk_weights;
  const Tensor& hidden_states;
  const Tensor& zero_weight;
  const std::optional<Tensor>& residual;
  const std::optional<Tensor>& constant_weight;
  const std::optional<Tensor>& constant_vectors;
};

inline void check_moe_finalize(const MoeFinalizeTensors& args) {
  const Tensor& hidden_states = args.hidden_states;
  const auto on_device = [&](const Tensor& tensor, const char* name) {
    check_device(tensor, name, hidden_states, "hidden_states");
  };
  on_device(args.rows, "rows");
  on_device(args.slot_rows, "slot_rows");
  on_device(args.topk_weights, "topk_weights");
  on_device(args.zero_weight, "zero_weight");
  if (args.residual) {
    on_device(*args.residual, "residual");
  }
  if (args.constant_weight) {
    on_device(*args.constant_weight, "constant_weight");
  }
  if (args.constant_vectors) {
    on_device(*args.constant_vectors, "constant_vectors");
  }

  check_floating(hidden_states, "hidden_states");
  const DType data = hidden_states.scalar_type();
  const auto has_dtype = [&](const Tensor& tensor, const char* name, DType wanted) {
    check_dtype(tensor, name, wanted, hidden_states, "hidden_states");
  };
  has_dtype(args.rows, "rows", data);
  check_dtype(args.slot_rows, "slot_rows", DType::Int);
  has_dtype(args.topk_weights, "topk_weights", weight_dtype(data));
  has_dtype(args.zero_weight, "zero_weight", weight_dtype(data));
  if (args.residual) {
    has_dtype(*args.residual, "residual", data);
  }
  if (args.constant_weight) {
    has_dtype(*args.constant_weight, "constant_weight", weight_dtype(data));
  }
  if (args.constant_vectors) {
    has_dtype(*args.constant_vectors, "constant_vectors", data);
  }

  check_dims(hidden_states, "hidden_states", 2, "[tokens, hidden_size]");
  check_dims(args.rows, "rows", 2, "[rows, hidden_size]");
  check_dims(args.slot_rows, "slot_rows", 2, "[tokens, top_k]");
  const int64_t num_tokens = hidden_states.size(0);
  const int64_t hidden_size = hidden_states.size(1);
  const int64_t num_rows = args.rows.size(0);
  const int64_t top_k = args.slot_rows.size(1);
  constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();
  ZEXPERT_CHECK(num_rows < kMostRows, "rows must have fewer than ", kMostRows, " rows, got ", num_rows);
  check_shape(args.rows, "rows", {num_rows, hidden_size}, "[rows, hidden_size]");
  check_shape(args.slot_rows, "slot_rows", {num_tokens, top_k}, "[tokens, top_k]");
  check_shape(args.topk_weights, "topk_weights", {num_tokens, top_k}, "[tokens, top_k]");
  check_shape(args.zero_weight, "zero_weight", {num_tokens}, "[tokens]");
  if (args.residual) {
    check_shape(*args.residual, "residual", {num_tokens, hidden_size}, "[tokens, hidden_size]");
  }

  int64_t num_constants = 0;
  if (args.constant_vectors) {
    check_dims(*args.constant_vectors, "constant_vectors", 2, "[constant_experts, hidden_size]");
    num_constants = args.constant_vectors->size(0);
    check_shape(*args.constant_vectors, "constant_vectors", {num_constants, hidden_size},
                "[constant_experts, hidden_size]");
  }
  if (args.constant_weight) {
    check_dims(*args.constant_weight, "constant_weight", 2, "[tokens, constant_experts]");
    ZEXPERT_CHECK(args.constant_vectors || args.constant_weight->size(1) == 0,
                  "constant_vectors must be given beside constant_weight of shape ",
                  text(args.constant_weight->sizes()), ", got None");
    check_shape(*args.constant_weight, "constant_weight", {num_tokens, num_constants}, "[tokens, constant_experts]");
  }
  ZEXPERT_CHECK(args.constant_weight || num_constants == 0,
                "constant_weight must be given beside constant_vectors of shape ", text(args.constant_vectors->sizes()),
                ", got None");
}

/// Calls launch(params) unless there is nothing to compute.
template <typename Launch>
Tensor moe_finalize(const MoeFinalizeTensors& args, const Launch& launch) {
  check_moe_finalize(args);
  const int64_t num_tokens = args.hidden_states.size(0);
  const int64_t hidden_size = args.hidden_states.size(1);
  const Tensor out = empty({num_tokens, hidden_size}, args.hidden_states.scalar_type(), args.hidden_states);
  if (out.numel() == 0) {
    return out;
  }

  const Tensor rows = with_unit_inner_stride(args.rows);
  const Tensor slot_rows = as_contiguous(args.slot_rows);
  const Tensor topk_weights = as_contiguous(args.topk_weights);
  const Tensor hidden_states = with_unit_inner_stride(args.hidden_states);
  const Tensor zero_weight = as_contiguous(args.zero_weight);
  MoeFinalizeParams params;
  params.rows = rows.const_data_ptr();
  params.slot_rows = slot_rows.const_data_ptr<int32_t>();
  params.topk_weights = topk_weights.const_data_ptr();
  params.hidden_states = hidden_states.const_data_ptr();
  params.zero_weight = zero_weight.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.data_type = element_type(hidden_states);
  params.num_rows = rows.size(0);
  params.num_tokens = num_tokens;
  params.top_k = slot_rows.size(1);
  params.hidden_size = hidden_size;
  params.rows_row_stride = rows.stride(0);
  params.hidden_row_stride = hidden_states.stride(0);

  std::optional<Tensor> residual;
  if (args.residual) {
    residual = with_unit_inner_stride(*args.residual);
    params.residual = residual->const_data_ptr();
    params.residual_row_stride = residual->stride(0);
  }
  std::optional<Tensor> constant_weight;
  std::optional<Tensor> constant_vectors;
  if (args.constant_weight && args.constant_vectors && args.constant_vectors->size(0) > 0) {
    constant_weight = as_contiguous(*args.constant_weight);
    constant_vectors = with_unit_inner_stride(*args.constant_vectors);
    params.constant_weight = constant_weight->const_data_ptr();
    params.constant_vectors = constant_vectors->const_data_ptr();
    params.num_constant_experts = constant_vectors->size(0);
    params.constant_row_stride = constant_vectors->stride(0);
  }
  launch(params);
  return out;
}

HIDDEN_NAMESPACE_END(zexpert, ops)
