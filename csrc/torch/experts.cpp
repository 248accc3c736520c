// SPDX-License-Identifier: Apache-2.0
#include "torch/experts.h"

#include <optional>

#include "torch/device.h"
#include "torch/expert_matrices.h"
#include "torch/segment_products.h"
#include "torch/token_rows.h"
#include "zexpert/silu_and_mul.h"

#ifndef ZEXPERT_FOR_CUDA
#include "torch/expert_by_expert.h"
#endif

ZEXPERT_DEVICE_NAMESPACE_BEGIN
namespace {

/// The rows in the plan's order: `rows_or_tokens` itself, or the tokens gathered.
Tensor rows_of(const Tensor& rows_or_tokens, const ExpertInputs& inputs) {
  return inputs.row_slots ? gather_rows(rows_or_tokens, inputs) : rows_or_tokens;
}

/// `rows`, or a dense copy if rows overlap, or GPUs cannot read them 16 bytes at a time.
Tensor with_aligned_rows(const Tensor& rows) {
  constexpr int64_t kBytes = 16;
  const auto misaligned =
      reinterpret_cast<intptr_t>(rows.const_data_ptr()) | (rows.stride(0) * static_cast<int64_t>(rows.element_size()));
  return misaligned % kBytes == 0 && rows.stride(0) >= rows.size(1) ? rows : dense_copy(rows);
}

/// The rows that an implementation multiplies, in the plan's order.
Tensor rows_for(GroupedMlpImplementation implementation, const Tensor& rows_or_tokens, const ExpertInputs& inputs) {
  const Tensor rows = rows_of(rows_or_tokens, inputs);
  return implementation == GroupedMlpImplementation::kTorch ? rows : with_aligned_rows(rows);
}

// zexpert's own kernels, those that need no segment products of PyTorch's

#ifdef ZEXPERT_FOR_CUDA

GroupedMlpDevice current_device() { return grouped_mlp_cuda_device(); }

void run_own_kernels(const ExpertInputs& inputs, const ExpertResults& results, bool /*keeps_gate_up*/) {
  if (inputs.weights.is_quantised()) {  // the kernels quantise rows where they gather them
    ExpertInputs aligned = inputs;
    aligned.rows = with_aligned_rows(inputs.rows);
    run_hopper_kernels(aligned, results.out, 0);
    return;
  }
  const Tensor rows = rows_for(GroupedMlpImplementation::kHopper, inputs.rows, inputs);
  const ExpertRows gathered{rows, inputs.expert_offsets, std::nullopt, std::nullopt, 1};
  run_hopper_kernels(ExpertInputs(gathered, inputs.weights), results.out, 0);
}

void differentiate_by_own_kernels(const ExpertInputs& /*inputs*/, const ExpertGradientInputs& /*given*/,
                                  const ExpertGradients& /*gradients*/) {
  zexpert::detail::throw_error("implementation \"hopper\" has no gradients");
}

#else

GroupedMlpDevice current_device() { return {}; }

void run_own_kernels(const ExpertInputs& inputs, const ExpertResults& results, bool keeps_gate_up) {
  if (keeps_gate_up) {
    run_expert_by_expert_keeping_gate_up(inputs, results.out, results.gate_up);
  } else if (results.out.numel() > 0) {
    run_expert_by_expert(inputs, results.out);
  }
}

void differentiate_by_own_kernels(const ExpertInputs& inputs, const ExpertGradientInputs& given,
                                  const ExpertGradients& gradients) {
  differentiate_expert_by_expert(inputs, given, gradients);
}

#endif

bool has_own_kernels(GroupedMlpImplementation implementation) {
  switch (implementation) {
    case GroupedMlpImplementation::kCpu:
    case GroupedMlpImplementation::kHopper: return true;
    case GroupedMlpImplementation::kGroupedMm:
    case GroupedMlpImplementation::kTorch: break;
  }
  return false;
}

Tensor activate(const Tensor& gate_up, const ExpertInputs& inputs) {
  const CurrentDevice device(gate_up);
  const Tensor activation = empty({gate_up.size(0), inputs.intermediate_size()}, gate_up.scalar_type(), gate_up);
  SiluAndMulParams params;
  params.gate_up = gate_up.const_data_ptr();
  params.out = activation.mutable_data_ptr();
  params.data_type = element_type(gate_up);
  params.num_rows = gate_up.size(0);
  params.intermediate_size = inputs.intermediate_size();
  params.gate_up_row_stride = gate_up.stride(0);
  params.out_row_stride = activation.stride(0);
  params.last_offset = inputs.last_offset();
  ZEXPERT_LAUNCH(silu_and_mul, params, device);
  return activation;
}

#ifdef ZEXPERT_FOR_CUDA
/// Whether all experts must be dequantised together, for the grouped product: while a CUDA graph is captured, the host
/// cannot read which experts have rows.
bool dequantizes_all(const ExpertInputs& inputs, GroupedMlpImplementation implementation, GroupedMlpTask task) {
  const GroupedMlpCall call{current_device(),          task,
                            element_type(inputs.rows), inputs.num_experts(),
                            inputs.hidden_size(),      inputs.intermediate_size()};
  return implementation == GroupedMlpImplementation::kTorch && inputs.weights.is_quantised() &&
         is_capturing(CurrentDevice(inputs.rows).stream()) &&
         can_serve(GroupedMlpImplementation::kGroupedMm, call, [](const auto&...) {});
}
#else
constexpr bool dequantizes_all(const ExpertInputs& /*inputs*/, GroupedMlpImplementation /*implementation*/,
                               GroupedMlpTask /*task*/) {
  return false;
}
#endif

ExpertInputs with_dequantized_weights(const ExpertInputs& inputs) {
  ExpertInputs result = inputs;
  result.weights = dequantized(inputs.weights, inputs.rows);
  return result;
}

/// Gate and up product, activation, down product, each for all experts. No size may be 0.
ExpertResults run_products(const ExpertInputs& inputs, GroupedMlpImplementation implementation, bool keeps_gate_up) {
  if (dequantizes_all(inputs, implementation, GroupedMlpTask::kForward)) {
    return run_products(with_dequantized_weights(inputs), GroupedMlpImplementation::kGroupedMm, keeps_gate_up);
  }
  const SegmentProducts multiply(implementation, inputs.expert_offsets, inputs.num_rows());
  Tensor gate_up = multiply.with_transposed(rows_for(implementation, inputs.rows, inputs), inputs.weights.gate_up());
  const Tensor activation = activate(gate_up, inputs);
  if (!keeps_gate_up) {
    gate_up = empty({0, gate_up.size(1)}, gate_up.scalar_type(), gate_up);  // gives its memory back
  }
  return {multiply.with_transposed(activation, inputs.weights.down()), gate_up};
}

/// What the activation's backward makes.
struct ActivationGradients {
  Tensor grad_gate_up;     ///< rows that do no work are 0
  Tensor activation;       ///< times the rows' weights; only if it is needed
  Tensor grad_row_weight;  ///< [rows], with weights
};

ActivationGradients differentiate_activation(const Tensor& grad_activation, const Tensor& gate_up,
                                             const ExpertInputs& inputs, const ExpertGradientInputs& given) {
  const CurrentDevice device(gate_up);
  const int64_t num_rows = gate_up.size(0);
  const int64_t inner = inputs.intermediate_size();
  const DType data = gate_up.scalar_type();
  ActivationGradients results;
  results.grad_gate_up = empty({num_rows, 2 * inner}, data, gate_up);
  SiluAndMulBackwardParams params;
  params.grad_out = grad_activation.const_data_ptr();
  params.gate_up = gate_up.const_data_ptr();
  params.grad_gate_up = results.grad_gate_up.mutable_data_ptr();
  std::optional<Tensor> row_weight;
  if (given.topk_weights) {
    row_weight = gather_row_weights(*given.topk_weights, inputs);
    results.grad_row_weight = empty({num_rows}, row_weight->scalar_type(), gate_up);
    params.row_weight = row_weight->const_data_ptr();
    params.grad_row_weight = results.grad_row_weight.mutable_data_ptr();
  }
  if (given.needs.w2_weight) {
    results.activation = empty({num_rows, inner}, data, gate_up);
    params.out = results.activation.mutable_data_ptr();
    params.out_row_stride = inner;
  }
  params.data_type = element_type(gate_up);
  params.num_rows = num_rows;
  params.intermediate_size = inner;
  params.grad_out_row_stride = grad_activation.stride(0);
  params.gate_up_row_stride = gate_up.stride(0);
  params.grad_gate_up_row_stride = 2 * inner;
  params.last_offset = inputs.last_offset();
  ZEXPERT_LAUNCH(silu_and_mul_backward, params, device);
  return results;
}

/// Gradients by products of all experts together. No size may be 0.
ExpertGradients differentiate_products(const ExpertInputs& inputs, const ExpertGradientInputs& given,
                                       GroupedMlpImplementation implementation) {
  if (dequantizes_all(inputs, implementation, GroupedMlpTask::kBackward)) {
    return differentiate_products(with_dequantized_weights(inputs), given, GroupedMlpImplementation::kGroupedMm);
  }
  const SegmentProducts multiply(implementation, inputs.expert_offsets, inputs.num_rows());
  const Tensor none = empty({0}, inputs.rows.scalar_type(), inputs.rows);
  ExpertGradients gradients{none, none, none, none};
  std::optional<Tensor> rows;
  const auto gathered_rows = [&] {
    rows = rows ? *rows : rows_for(implementation, inputs.rows, inputs);
    return *rows;
  };

  // Gate and up, and their gradients
  ActivationGradients activation;
  {
    const Tensor gate_up =
        given.gate_up ? *given.gate_up : multiply.with_transposed(gathered_rows(), inputs.weights.gate_up());
    const Tensor grad_out = rows_for(implementation, given.grad_out, inputs);
    const Tensor grad_activation = multiply.with_matrices(grad_out, inputs.weights.down());
    activation = differentiate_activation(grad_activation, gate_up, inputs, given);
    if (given.needs.w2_weight) {
      gradients.w2_weight = multiply.between(grad_out, activation.activation);
    }
  }

  // Gradients of what they were computed from
  if (given.topk_weights) {
    gradients.topk_weights = scatter_row_weights(activation.grad_row_weight, inputs);
  }
  if (given.needs.w13_weight) {
    gradients.w13_weight = multiply.between(activation.grad_gate_up, gathered_rows());
  }
  if (given.needs.rows) {
    gradients.rows = multiply.with_matrices(activation.grad_gate_up, inputs.weights.gate_up());
    if (!given.topk_weights) {
      zero_idle_rows(gradients.rows, inputs);
    }
  }
  return gradients;
}

/// What differentiate_by_own_kernels writes; all of it 0 where sums have no terms.
ExpertGradients allocate_gradients(const ExpertInputs& inputs, const ExpertGradientInputs& given) {
  const DType data = inputs.rows.scalar_type();
  const int64_t hidden = inputs.hidden_size();
  const int64_t inner = inputs.intermediate_size();
  const auto allocate = [&](bool is_needed, std::initializer_list<int64_t> sizes, DType dtype) {
    return is_needed ? empty(sizes, dtype, inputs.rows) : empty({0}, dtype, inputs.rows);
  };
  ExpertGradients gradients{allocate(given.needs.rows, {inputs.num_rows(), hidden}, data),
                            allocate(given.needs.w13_weight, {inputs.num_experts(), 2 * inner, hidden}, data),
                            allocate(given.needs.w2_weight, {inputs.num_experts(), hidden, inner}, data),
                            allocate(false, {0}, data)};
  if (given.topk_weights) {
    const Tensor& weights = *given.topk_weights;
    gradients.topk_weights = empty({weights.size(0), weights.size(1)}, weights.scalar_type(), weights);
    zero_rows(gradients.topk_weights, 0, weights.size(0));
  }
  return gradients;
}

void zero_all(const ExpertGradients& gradients) {
  for (const Tensor* tensor : {&gradients.rows, &gradients.w13_weight, &gradients.w2_weight}) {
    zero_rows(*tensor, 0, tensor->size(0));
  }
}

}  // namespace

#ifdef ZEXPERT_FOR_CUDA
void run_hopper_kernels(const ExpertInputs& inputs, const Tensor& out, int64_t tile_rows) {
  const CurrentDevice device(inputs.rows);
  GroupedMlpParams params = inputs.params();
  params.out = out.mutable_data_ptr();
  params.out_row_stride = out.stride(0);
  params.tile_rows = tile_rows;
  const std::optional<Tensor> workspace = empty_workspace(ZEXPERT_WORKSPACE_BYTES(grouped_mlp, params), out);
  params.workspace = workspace ? workspace->mutable_data_ptr() : nullptr;
  grouped_mlp_cuda(params, device.stream());
}
#endif

GroupedMlpImplementation choose_implementation(const std::string& requested, const Tensor& rows,
                                               const ExpertWeights& weights, GroupedMlpTask task) {
  return choose_grouped_mlp(requested, {current_device(), task, element_type(rows), weights.num_experts(),
                                        weights.hidden_size(), weights.intermediate_size(), weights.is_quantised()});
}

ExpertResults run_experts(const ExpertInputs& inputs, GroupedMlpImplementation implementation, bool keeps_gate_up) {
  const int64_t num_rows = inputs.num_rows();
  const int64_t gate_up_size = 2 * inputs.intermediate_size();
  const bool has_products = num_rows > 0 && inputs.num_experts() > 0 && inputs.hidden_size() > 0 && gate_up_size > 0;
  if (has_products && !has_own_kernels(implementation)) {
    return run_products(inputs, implementation, keeps_gate_up);
  }
  const DType data = inputs.rows.scalar_type();
  const ExpertResults results{empty({num_rows, inputs.hidden_size()}, data, inputs.rows),
                              empty({keeps_gate_up ? num_rows : 0, gate_up_size}, data, inputs.rows)};
  const bool checks_offsets = implementation == GroupedMlpImplementation::kCpu && num_rows > 0;
  if (has_products || checks_offsets) {
    run_own_kernels(inputs, results, keeps_gate_up);
  } else {  // sums without terms
    zero_rows(results.out, 0, num_rows);
    zero_rows(results.gate_up, 0, results.gate_up.size(0));
  }
  return results;
}

ExpertGradients differentiate_experts(const ExpertInputs& inputs, const ExpertGradientInputs& given,
                                      GroupedMlpImplementation implementation) {
  const bool has_products =
      inputs.num_rows() > 0 && inputs.num_experts() > 0 && inputs.hidden_size() > 0 && inputs.intermediate_size() > 0;
  if (has_products && !has_own_kernels(implementation)) {
    return differentiate_products(inputs, given, implementation);
  }
  const ExpertGradients gradients = allocate_gradients(inputs, given);
  if (has_products) {
    differentiate_by_own_kernels(inputs, given, gradients);
  } else {
    zero_all(gradients);
  }
  return gradients;
}

ZEXPERT_DEVICE_NAMESPACE_END
