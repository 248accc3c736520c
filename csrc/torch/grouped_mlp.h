// grouped_mlp for tensors on any device: checks, output, parameters.
#pragma once

#include "torch/checks.h"
#include "torch/tensor.h"
#include "zexpert/grouped_mlp.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Calls launch(params, out) unless there is nothing to compute; `out` gives the launch dtype and device for scratch.
template <typename Launch>
Tensor grouped_mlp(const Tensor& rows, const Tensor& expert_offsets, const Tensor& w13_weight, const Tensor& w2_weight,
                   const Launch& launch) {
  check_device(expert_offsets, "expert_offsets", rows, "rows");
  check_device(w13_weight, "w13_weight", rows, "rows");
  check_device(w2_weight, "w2_weight", rows, "rows");
  check_floating(rows, "rows");
  check_dtype(expert_offsets, "expert_offsets", DType::Int);
  check_dtype(w13_weight, "w13_weight", rows.scalar_type(), rows, "rows");
  check_dtype(w2_weight, "w2_weight", rows.scalar_type(), rows, "rows");
  check_dims(rows, "rows", 2, "[rows, hidden_size]");
  check_expert_offsets_dims(expert_offsets);
  check_dims(w13_weight, "w13_weight", 3, "[experts, 2 * intermediate_size, hidden_size]");
  const int64_t num_experts = expert_offsets.size(0) - 1;
  const int64_t hidden_size = rows.size(1);
  const int64_t intermediate_size = w13_weight.size(1) / 2;
  ZEXPERT_CHECK(w13_weight.size(1) % 2 == 0, "w13_weight must have an even second size, gate and up rows, got shape ",
                text(w13_weight.sizes()));
  check_shape(w13_weight, "w13_weight", {num_experts, 2 * intermediate_size, hidden_size},
              "[experts, 2 * intermediate_size, hidden_size]");
  check_shape(w2_weight, "w2_weight", {num_experts, hidden_size, intermediate_size},
              "[experts, hidden_size, intermediate_size]");

  const Tensor out = empty({rows.size(0), hidden_size}, rows.scalar_type(), rows);
  if (out.numel() > 0) {
    const Tensor inputs = with_unit_inner_stride(rows);
    const Tensor offsets = as_contiguous(expert_offsets);
    const Tensor w13 = with_contiguous_matrices(w13_weight);
    const Tensor w2 = with_contiguous_matrices(w2_weight);
    GroupedMlpParams params;
    params.rows = inputs.const_data_ptr();
    params.expert_offsets = offsets.const_data_ptr<int32_t>();
    params.w13_weight = w13.const_data_ptr();
    params.w2_weight = w2.const_data_ptr();
    params.out = out.mutable_data_ptr();
    params.data_type = element_type(rows);
    params.num_rows = rows.size(0);
    params.num_experts = num_experts;
    params.hidden_size = hidden_size;
    params.intermediate_size = intermediate_size;
    params.rows_row_stride = inputs.stride(0);
    params.out_row_stride = out.stride(0);
    params.w13_expert_stride = w13.stride(0);
    params.w2_expert_stride = w2.stride(0);
    launch(params, out);
  }
  return out;
}

HIDDEN_NAMESPACE_END(zexpert, ops)
