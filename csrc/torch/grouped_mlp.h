// SPDX-License-Identifier: Apache-2.0
// grouped_mlp and grouped_mlp_with_gate_up for tensors on any device: checks, outputs, parameters.
#pragma once

#include <optional>
#include <tuple>

#include "torch/checks.h"
#include "torch/tensor.h"
#include "zexpert/grouped_mlp.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Which token each row is, where an op is given tokens instead of rows.
struct TokensOfRows {
  std::optional<Tensor> row_slots;  ///< [rows]; row r is token row_slots[r] / top_k
  int64_t top_k = 1;

  int64_t num_rows(const Tensor& rows) const { return row_slots ? row_slots->size(0) : rows.size(0); }
};

/// `name` is what the op calls its rows.
inline void check_grouped_mlp(const Tensor& rows, const Tensor& expert_offsets, const Tensor& w13_weight,
                              const Tensor& w2_weight, const char* name = "rows", const TokensOfRows& tokens = {}) {
  check_device(expert_offsets, "expert_offsets", rows, name);
  check_device(w13_weight, "w13_weight", rows, name);
  check_device(w2_weight, "w2_weight", rows, name);
  if (tokens.row_slots) {
    check_device(*tokens.row_slots, "row_slots", rows, name);
  }
  check_floating(rows, name);
  check_dtype(expert_offsets, "expert_offsets", DType::Int);
  check_dtype(w13_weight, "w13_weight", rows.scalar_type(), rows, name);
  check_dtype(w2_weight, "w2_weight", rows.scalar_type(), rows, name);
  if (tokens.row_slots) {
    check_dtype(*tokens.row_slots, "row_slots", DType::Int);
  }
  check_dims(rows, name, 2, "[rows, hidden_size]");
  check_expert_offsets_dims(expert_offsets);
  check_dims(w13_weight, "w13_weight", 3, "[experts, 2 * intermediate_size, hidden_size]");
  if (tokens.row_slots) {
    check_dims(*tokens.row_slots, "row_slots", 1, "[rows]");
  }
  const int64_t num_experts = expert_offsets.size(0) - 1;
  const int64_t hidden_size = rows.size(1);
  const int64_t intermediate_size = w13_weight.size(1) / 2;
  ZEXPERT_CHECK(w13_weight.size(1) % 2 == 0, "w13_weight must have an even second size, gate and up rows, got shape ",
                text(w13_weight.sizes()));
  check_shape(w13_weight, "w13_weight", {num_experts, 2 * intermediate_size, hidden_size},
              "[experts, 2 * intermediate_size, hidden_size]");
  check_shape(w2_weight, "w2_weight", {num_experts, hidden_size, intermediate_size},
              "[experts, hidden_size, intermediate_size]");
  if (tokens.row_slots) {
    ZEXPERT_CHECK(tokens.top_k >= 1, "top_k must be at least 1, got ", tokens.top_k);
    check_row_slots_size(*tokens.row_slots, rows.size(0), tokens.top_k);
  }
}

/// Checked arguments in the layout that kernels take, and parameters that point at them and lack the output.
struct GroupedMlpInputs {
  GroupedMlpInputs(const Tensor& rows_arg, const Tensor& offsets_arg, const Tensor& w13_arg, const Tensor& w2_arg,
                   const TokensOfRows& tokens = {})
      : rows(with_unit_inner_stride(rows_arg)),
        expert_offsets(as_contiguous(offsets_arg)),
        w13_weight(with_contiguous_matrices(w13_arg)),
        w2_weight(with_contiguous_matrices(w2_arg)) {
    params.rows = rows.const_data_ptr();
    params.expert_offsets = expert_offsets.const_data_ptr<int32_t>();
    params.w13_weight = w13_weight.const_data_ptr();
    params.w2_weight = w2_weight.const_data_ptr();
    params.data_type = element_type(rows);
    params.num_rows = rows.size(0);
    params.num_experts = w13_weight.size(0);
    params.hidden_size = rows.size(1);
    params.intermediate_size = w2_weight.size(2);
    params.rows_row_stride = rows.stride(0);
    params.w13_expert_stride = w13_weight.stride(0);
    params.w2_expert_stride = w2_weight.stride(0);
    if (tokens.row_slots) {
      row_slots = as_contiguous(*tokens.row_slots);
      params.row_slots = row_slots->const_data_ptr<int32_t>();
      params.num_rows = row_slots->size(0);
      params.num_tokens = rows.size(0);
      params.top_k = tokens.top_k;
    }
  }

  Tensor rows;
  Tensor expert_offsets;
  Tensor w13_weight;
  Tensor w2_weight;
  std::optional<Tensor> row_slots;
  GroupedMlpParams params;
};

/// Calls launch(params, out) unless there is nothing to compute; `out`, a row for each of the `tokens`' rows, gives the
/// launch dtype and device for scratch.
template <typename Launch>
Tensor grouped_mlp(const Tensor& rows, const Tensor& expert_offsets, const Tensor& w13_weight, const Tensor& w2_weight,
                   const Launch& launch, const TokensOfRows& tokens = {}) {
  check_grouped_mlp(rows, expert_offsets, w13_weight, w2_weight, "rows", tokens);
  const Tensor out = empty({tokens.num_rows(rows), rows.size(1)}, rows.scalar_type(), rows);
  if (out.numel() > 0) {
    GroupedMlpInputs inputs(rows, expert_offsets, w13_weight, w2_weight, tokens);
    inputs.params.out = out.mutable_data_ptr();
    inputs.params.out_row_stride = out.stride(0);
    launch(inputs.params, out);
  }
  return out;
}

/// Calls launch(params, gate_up) unless there are no rows; returns (out, gate_up), gate_up [rows, 2 *
/// intermediate_size] being what the activation is taken of.
template <typename Launch>
std::tuple<Tensor, Tensor> grouped_mlp_with_gate_up(const Tensor& rows, const Tensor& expert_offsets,
                                                    const Tensor& w13_weight, const Tensor& w2_weight,
                                                    const Launch& launch, const TokensOfRows& tokens = {}) {
  check_grouped_mlp(rows, expert_offsets, w13_weight, w2_weight, "rows", tokens);
  const int64_t num_rows = tokens.num_rows(rows);
  const Tensor out = empty({num_rows, rows.size(1)}, rows.scalar_type(), rows);
  const Tensor gate_up = empty({num_rows, w13_weight.size(1)}, rows.scalar_type(), rows);
  if (num_rows > 0) {
    GroupedMlpInputs inputs(rows, expert_offsets, w13_weight, w2_weight, tokens);
    inputs.params.out = out.mutable_data_ptr();
    inputs.params.out_row_stride = out.stride(0);
    launch(inputs.params, gate_up);
  }
  return {out, gate_up};
}

HIDDEN_NAMESPACE_END(zexpert, ops)
