// SPDX-License-Identifier: Apache-2.0
#include "torch/moe_finalize.h"

#include <cstdint>
#include <limits>
#include <optional>
#include <tuple>

#include "torch/checks.h"
#include "torch/device.h"
#include "torch/tensor.h"
#include "zexpert/moe_finalize.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

int64_t num_constant_experts(const MoeFinalizeTensors& args) {
  return args.constant_vectors ? args.constant_vectors->size(0) : 0;
}

void check_devices(const MoeFinalizeTensors& args) {
  const auto on_device = [&](const Tensor& tensor, const char* name) {
    check_device(tensor, name, args.hidden_states, "hidden_states");
  };
  on_device(args.rows, "rows");
  on_device(args.slot_rows, "slot_rows");
  if (args.topk_weights) {
    on_device(*args.topk_weights, "topk_weights");
  }
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
}

void check_dtypes(const MoeFinalizeTensors& args) {
  check_floating(args.hidden_states, "hidden_states");
  const DType data = args.hidden_states.scalar_type();
  const auto has_dtype = [&](const Tensor& tensor, const char* name, DType wanted) {
    check_dtype(tensor, name, wanted, args.hidden_states, "hidden_states");
  };
  has_dtype(args.rows, "rows", data);
  check_dtype(args.slot_rows, "slot_rows", DType::Int);
  if (args.topk_weights) {
    has_dtype(*args.topk_weights, "topk_weights", weight_dtype(data));
  }
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
}

void check_constants(const MoeFinalizeTensors& args) {
  if (args.constant_vectors) {
    check_dims(*args.constant_vectors, "constant_vectors", 2, "[constant_experts, hidden_size]");
    check_shape(*args.constant_vectors, "constant_vectors", {num_constant_experts(args), args.hidden_states.size(1)},
                "[constant_experts, hidden_size]");
  }
  if (args.constant_weight) {
    check_dims(*args.constant_weight, "constant_weight", 2, "[tokens, constant_experts]");
    ZEXPERT_CHECK(args.constant_vectors || args.constant_weight->size(1) == 0, "constant_weight of shape ",
                  text(args.constant_weight->sizes()), " needs constant_vectors, got None");
    check_shape(*args.constant_weight, "constant_weight", {args.hidden_states.size(0), num_constant_experts(args)},
                "[tokens, constant_experts]");
  }
  ZEXPERT_CHECK(args.constant_weight || num_constant_experts(args) == 0, "constant_vectors of shape ",
                text(args.constant_vectors->sizes()), " needs constant_weight, got None");
}

void check_moe_finalize(const MoeFinalizeTensors& args) {
  check_devices(args);
  check_dtypes(args);
  check_dims(args.hidden_states, "hidden_states", 2, "[tokens, hidden_size]");
  check_dims(args.rows, "rows", 2, "[rows, hidden_size]");
  check_dims(args.slot_rows, "slot_rows", 2, "[tokens, top_k]");
  const int64_t num_tokens = args.hidden_states.size(0);
  const int64_t hidden_size = args.hidden_states.size(1);
  const int64_t num_rows = args.rows.size(0);
  const int64_t top_k = args.slot_rows.size(1);
  constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();
  ZEXPERT_CHECK(num_rows < kMostRows, "rows must have fewer than ", kMostRows, " rows, got ", num_rows);
  check_shape(args.rows, "rows", {num_rows, hidden_size}, "[rows, hidden_size]");
  check_shape(args.slot_rows, "slot_rows", {num_tokens, top_k}, "[tokens, top_k]");
  if (args.topk_weights) {
    check_shape(*args.topk_weights, "topk_weights", {num_tokens, top_k}, "[tokens, top_k]");
  }
  check_shape(args.zero_weight, "zero_weight", {num_tokens}, "[tokens]");
  if (args.residual) {
    check_shape(*args.residual, "residual", {num_tokens, hidden_size}, "[tokens, hidden_size]");
  }
  check_constants(args);
}

Tensor moe_finalize_op(const Tensor& rows, const Tensor& slot_rows, const Tensor& topk_weights,
                       const Tensor& hidden_states, const Tensor& zero_weight, const std::optional<Tensor>& residual,
                       const std::optional<Tensor>& constant_weight, const std::optional<Tensor>& constant_vectors) {
  const CurrentDevice device(hidden_states);
  return moe_finalize(
      {rows, slot_rows, topk_weights, hidden_states, zero_weight, residual, constant_weight, constant_vectors}, device);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_finalize_backward(const Tensor& grad_out, const Tensor& rows,
                                                                 const Tensor& slot_rows, const Tensor& topk_weights,
                                                                 const Tensor& hidden_states,
                                                                 const Tensor& zero_weight) {
  const CurrentDevice device(hidden_states);
  check_device(grad_out, "grad_out", hidden_states, "hidden_states");
  const std::optional<Tensor> none;
  check_moe_finalize({rows, slot_rows, topk_weights, hidden_states, zero_weight, none, none, none});
  const DType data = hidden_states.scalar_type();
  check_dtype(grad_out, "grad_out", data, hidden_states, "hidden_states");
  const int64_t num_rows = rows.size(0);
  const int64_t num_tokens = hidden_states.size(0);
  const int64_t top_k = slot_rows.size(1);
  const int64_t hidden_size = hidden_states.size(1);
  check_shape(grad_out, "grad_out", {num_tokens, hidden_size}, "[tokens, hidden_size]");

  const Tensor grad_rows = empty({num_rows, hidden_size}, data, hidden_states);
  const Tensor grad_topk_weights = empty({num_tokens, top_k}, topk_weights.scalar_type(), hidden_states);
  const Tensor grad_hidden_states = empty({num_tokens, hidden_size}, data, hidden_states);
  const Tensor grad_zero_weight = empty({num_tokens}, zero_weight.scalar_type(), hidden_states);
  const Tensor gradients = with_unit_inner_stride(grad_out);
  const Tensor expert_rows = with_unit_inner_stride(rows);
  const Tensor row_of_slot = as_contiguous(slot_rows);
  const Tensor weights = as_contiguous(topk_weights);
  const Tensor tokens = with_unit_inner_stride(hidden_states);
  const Tensor zero_weights = as_contiguous(zero_weight);
  MoeFinalizeBackwardParams params;
  params.grad_out = gradients.const_data_ptr();
  params.rows = expert_rows.const_data_ptr();
  params.slot_rows = row_of_slot.const_data_ptr<int32_t>();
  params.topk_weights = weights.const_data_ptr();
  params.hidden_states = tokens.const_data_ptr();
  params.zero_weight = zero_weights.const_data_ptr();
  params.grad_rows = grad_rows.mutable_data_ptr();
  params.grad_topk_weights = grad_topk_weights.mutable_data_ptr();
  params.grad_hidden_states = grad_hidden_states.mutable_data_ptr();
  params.grad_zero_weight = grad_zero_weight.mutable_data_ptr();
  params.data_type = element_type(hidden_states);
  params.num_rows = num_rows;
  params.num_tokens = num_tokens;
  params.top_k = top_k;
  params.hidden_size = hidden_size;
  params.grad_out_row_stride = gradients.stride(0);
  params.rows_row_stride = expert_rows.stride(0);
  params.hidden_row_stride = tokens.stride(0);
  const std::optional<Tensor> workspace =
      empty_workspace(ZEXPERT_WORKSPACE_BYTES(moe_finalize_backward, params), hidden_states);
  params.workspace = workspace ? workspace->mutable_data_ptr() : nullptr;
  ZEXPERT_LAUNCH(moe_finalize_backward, params, device);
  return {grad_rows, grad_topk_weights, grad_hidden_states, grad_zero_weight};
}

}  // namespace

Tensor moe_finalize(const MoeFinalizeTensors& args, const CurrentDevice& device) {
  check_moe_finalize(args);
  const int64_t num_tokens = args.hidden_states.size(0);
  const int64_t hidden_size = args.hidden_states.size(1);
  const Tensor out = empty({num_tokens, hidden_size}, args.hidden_states.scalar_type(), args.hidden_states);
  const Tensor rows = with_unit_inner_stride(args.rows);
  const Tensor slot_rows = as_contiguous(args.slot_rows);
  const Tensor hidden_states = with_unit_inner_stride(args.hidden_states);
  const Tensor zero_weight = as_contiguous(args.zero_weight);
  MoeFinalizeParams params;
  params.rows = rows.const_data_ptr();
  params.slot_rows = slot_rows.const_data_ptr<int32_t>();
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
  params.out_row_stride = out.stride(0);

  std::optional<Tensor> topk_weights;
  if (args.topk_weights) {
    topk_weights = as_contiguous(*args.topk_weights);
    params.topk_weights = topk_weights->const_data_ptr();
  }
  std::optional<Tensor> residual;
  if (args.residual) {
    residual = with_unit_inner_stride(*args.residual);
    params.residual = residual->const_data_ptr();
    params.residual_row_stride = residual->stride(0);
  }
  std::optional<Tensor> constant_weight;
  std::optional<Tensor> constant_vectors;
  if (args.constant_weight && num_constant_experts(args) > 0) {
    constant_weight = as_contiguous(*args.constant_weight);
    constant_vectors = with_unit_inner_stride(*args.constant_vectors);
    params.constant_weight = constant_weight->const_data_ptr();
    params.constant_vectors = constant_vectors->const_data_ptr();
    params.num_constant_experts = constant_vectors->size(0);
    params.constant_row_stride = constant_vectors->stride(0);
  }
  ZEXPERT_LAUNCH(moe_finalize, params, device);
  return out;
}

Tensor zero_weight_gradient(const Tensor& grad_out, const Tensor& hidden_states, const CurrentDevice& device) {
  const Tensor gradients = with_unit_inner_stride(grad_out);
  const Tensor tokens = with_unit_inner_stride(hidden_states);
  const Tensor grad_zero_weight = empty({tokens.size(0)}, weight_dtype(tokens.scalar_type()), tokens);
  MoeFinalizeBackwardParams params;
  params.grad_out = gradients.const_data_ptr();
  params.hidden_states = tokens.const_data_ptr();
  params.grad_zero_weight = grad_zero_weight.mutable_data_ptr();
  params.data_type = element_type(tokens);
  params.num_tokens = tokens.size(0);
  params.hidden_size = tokens.size(1);
  params.grad_out_row_stride = gradients.stride(0);
  params.hidden_row_stride = tokens.stride(0);
  ZEXPERT_LAUNCH(moe_finalize_backward, params, device);
  return grad_zero_weight;
}

ZEXPERT_OPERATORS(m) {
  m.impl("moe_finalize", TORCH_BOX(&moe_finalize_op));
  m.impl("moe_finalize_backward", TORCH_BOX(&moe_finalize_backward));
}

ZEXPERT_DEVICE_NAMESPACE_END
