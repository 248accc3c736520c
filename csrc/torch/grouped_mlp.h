// SPDX-License-Identifier: Apache-2.0
// What grouped_mlp and fused_moe compute from, on any device: checks, dense layouts, parameters.
#pragma once

#include <initializer_list>
#include <optional>

#include "torch/checks.h"
#include "torch/expert_weights.h"
#include "torch/tensor.h"
#include "zexpert/grouped_mlp.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// What the experts are run over: rows in the plan's order, or the tokens that row_slots gathers them from.
struct ExpertRows {
  Tensor rows;                      ///< [rows, hidden_size]; with row_slots [tokens, hidden_size]
  Tensor expert_offsets;            ///< [experts + 1]
  std::optional<Tensor> row_slots;  ///< [rows]; row r is token row_slots[r] / top_k
  std::optional<Tensor> slot_rows;  ///< [tokens, top_k]; the inverse of row_slots, or nullopt
  int64_t top_k = 1;                ///< with row_slots

  int64_t num_rows() const { return row_slots ? row_slots->size(0) : rows.size(0); }
};

/// `name` is what the operator calls `rows`.
inline void check_grouped_mlp(const ExpertRows& rows, const ExpertWeights& weights, const char* name = "rows") {
  check_device(rows.expert_offsets, "expert_offsets", rows.rows, name);
  weights.check_devices(rows.rows, name);
  if (rows.row_slots) {
    check_device(*rows.row_slots, "row_slots", rows.rows, name);
  }
  check_floating(rows.rows, name);
  check_dtype(rows.expert_offsets, "expert_offsets", DType::Int);
  weights.check_dtypes(rows.rows, name);
  if (rows.row_slots) {
    check_dtype(*rows.row_slots, "row_slots", DType::Int);
  }
  check_dims(rows.rows, name, 2, "[rows, hidden_size]");
  check_expert_offsets_dims(rows.expert_offsets);
  weights.check_num_dims();
  if (rows.row_slots) {
    check_dims(*rows.row_slots, "row_slots", 1, "[rows]");
  }
  weights.check_shapes(rows.expert_offsets.size(0) - 1, rows.rows.size(1));
  if (rows.row_slots) {
    ZEXPERT_CHECK(rows.top_k >= 1, "top_k must be at least 1, got ", rows.top_k);
    check_row_slots_size(*rows.row_slots, rows.rows.size(0), rows.top_k);
  } else {
    ZEXPERT_CHECK(rows.top_k == 1, "top_k must be 1 without row_slots, got ", rows.top_k);
  }
}

/// Throws Error if a gradient of quantised weights is wanted.
inline void check_no_gradients_of_quantised(const ExpertWeights& weights, bool needs_w13, bool needs_w2) {
  ZEXPERT_CHECK(!weights.is_quantised() || !(needs_w13 || needs_w2), needs_w13 ? "needs_w13_weight" : "needs_w2_weight",
                " must be False with float8_e4m3fn weights, which have no gradients, got True");
}

/// Checked arguments in the layout that kernels accept.
struct ExpertInputs {
  ExpertInputs(const ExpertRows& given, const ExpertWeights& given_weights)
      : rows(with_unit_inner_stride(given.rows)),
        expert_offsets(as_contiguous(given.expert_offsets)),
        weights(given_weights.with_contiguous_matrices()),
        top_k(given.top_k) {
    if (given.row_slots) {
      row_slots = as_contiguous(*given.row_slots);
    }
    if (given.slot_rows) {
      slot_rows = as_contiguous(*given.slot_rows);
    }
  }

  int64_t num_rows() const { return row_slots ? row_slots->size(0) : rows.size(0); }
  int64_t num_experts() const { return weights.num_experts(); }
  int64_t hidden_size() const { return weights.hidden_size(); }
  int64_t intermediate_size() const { return weights.intermediate_size(); }
  const int32_t* last_offset() const { return expert_offsets.const_data_ptr<int32_t>() + num_experts(); }

  /// Without the output.
  GroupedMlpParams params() const {
    GroupedMlpParams params;
    params.rows = rows.const_data_ptr();
    params.expert_offsets = expert_offsets.const_data_ptr<int32_t>();
    params.row_slots = row_slots ? row_slots->const_data_ptr<int32_t>() : nullptr;
    params.w13_weight = weights.w13.const_data_ptr();
    params.w2_weight = weights.w2.const_data_ptr();
    params.data_type = element_type(rows);
    params.num_rows = num_rows();
    params.num_tokens = row_slots ? rows.size(0) : 0;
    params.top_k = top_k;
    params.num_experts = num_experts();
    params.hidden_size = hidden_size();
    params.intermediate_size = intermediate_size();
    params.rows_row_stride = rows.stride(0);
    params.w13_expert_stride = weights.w13.stride(0);
    params.w2_expert_stride = weights.w2.stride(0);
    if (weights.is_quantised()) {
      params.w13_scale_inv = weights.scales.w13->const_data_ptr<float>();
      params.w2_scale_inv = weights.scales.w2->const_data_ptr<float>();
      params.w13_scale_expert_stride = weights.scales.w13->stride(0);
      params.w2_scale_expert_stride = weights.scales.w2->stride(0);
    }
    return params;
  }

  Tensor rows;
  Tensor expert_offsets;
  ExpertWeights weights;
  std::optional<Tensor> row_slots;
  std::optional<Tensor> slot_rows;
  int64_t top_k;
};

/// Which gradients the caller wants; the others cost nothing and are empty tensors.
struct ExpertNeeds {
  bool rows;
  bool w13_weight;
  bool w2_weight;
};

/// Inputs of the backward in addition to the forward's.
struct ExpertGradientInputs {
  Tensor grad_out;                ///< [rows, hidden_size]; with topk_weights [tokens, hidden_size]; unit inner stride
  std::optional<Tensor> gate_up;  ///< [rows, 2 * intermediate_size], unit inner stride; nullopt: computed again
  std::optional<Tensor>
      topk_weights;  ///< [tokens, top_k], contiguous: results are weighted, and grad_out is their sums'
  ExpertNeeds needs;
};

/// Dense.
struct ExpertGradients {
  Tensor rows;          ///< [rows, hidden_size]; rows that do no work are 0, with topk_weights they hold anything
  Tensor w13_weight;    ///< [experts, 2 * intermediate_size, hidden_size]; 0 for an expert without rows
  Tensor w2_weight;     ///< [experts, hidden_size, intermediate_size]; 0 for an expert without rows
  Tensor topk_weights;  ///< [tokens, top_k] with topk_weights: 0 for a slot without a row
};

HIDDEN_NAMESPACE_END(zexpert, ops)
