// grouped_mlp_backward on the CPU: expert by expert through torch's matrix product.
#include "torch/grouped_mlp_backward.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/expert_offsets.h"
#include "torch/matrix_product.h"
#include "zexpert/silu_and_mul_backward.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

/// Memory for one expert's rows, written anew for every expert.
struct Scratch {
  Scratch(int64_t num_rows, int64_t inner, bool recomputes_gate_up, const Tensor& like)
      : gate_up(empty({recomputes_gate_up ? num_rows : 0, 2 * inner}, like.scalar_type(), like)),
        activation(empty({num_rows, inner}, like.scalar_type(), like)),
        grad_activation(empty({num_rows, inner}, like.scalar_type(), like)),
        grad_gate_up(empty({num_rows, 2 * inner}, like.scalar_type(), like)) {}

  Tensor gate_up;
  Tensor activation;
  Tensor grad_activation;
  Tensor grad_gate_up;
};

/// Fills scratch.grad_gate_up from scratch.grad_activation, and scratch.activation on the way.
void activate_backward(ScalarType data_type, const Matrix& gate_up, const Scratch& scratch) {
  SiluAndMulBackwardParams params;
  params.grad_out = scratch.grad_activation.const_data_ptr();
  params.gate_up = gate_up.data;
  params.grad_gate_up = scratch.grad_gate_up.mutable_data_ptr();
  params.out = scratch.activation.mutable_data_ptr();
  params.data_type = data_type;
  params.num_rows = gate_up.num_rows;
  params.intermediate_size = gate_up.num_columns / 2;
  params.grad_out_row_stride = params.intermediate_size;
  params.gate_up_row_stride = gate_up.row_stride;
  params.grad_gate_up_row_stride = gate_up.num_columns;
  params.out_row_stride = params.intermediate_size;
  silu_and_mul_backward_cpu(params);
}

void differentiate_expert(const GroupedMlpBackwardParams& params, const MatrixProduct& multiply, int64_t expert,
                          const Scratch& scratch, const GroupedMlpGradients& gradients) {
  const GroupedMlpParams& forward = params.forward;
  const int64_t hidden = forward.hidden_size;
  const int64_t inner = forward.intermediate_size;
  const int64_t first = forward.expert_offsets[expert];
  const int64_t num_rows = forward.expert_offsets[expert + 1] - first;
  const auto segment = [&](const void* base, int64_t num_columns, int64_t row_stride) {
    return multiply.matrix(base, first * row_stride, num_rows, num_columns, row_stride);
  };
  const auto scratch_rows = [&](const Tensor& tensor) {
    return multiply.matrix(tensor.const_data_ptr(), 0, num_rows, tensor.size(1), tensor.size(1));
  };
  const auto gradient_of_weight = [&](const Tensor& tensor) {
    return multiply.matrix(tensor.const_data_ptr(), expert * tensor.stride(0), tensor.size(1), tensor.size(2),
                           tensor.size(2));
  };
  const Matrix rows = segment(forward.rows, hidden, forward.rows_row_stride);
  const Matrix grad_out = segment(params.grad_out, hidden, params.grad_out_row_stride);
  const Matrix w13 = multiply.matrix(forward.w13_weight, expert * forward.w13_expert_stride, 2 * inner, hidden, hidden);
  const Matrix w2 = multiply.matrix(forward.w2_weight, expert * forward.w2_expert_stride, hidden, inner, inner);
  const bool recomputes = params.gate_up == nullptr;
  const Matrix gate_up =
      recomputes ? scratch_rows(scratch.gate_up) : segment(params.gate_up, 2 * inner, params.gate_up_row_stride);
  const Matrix grad_gate_up = scratch_rows(scratch.grad_gate_up);

  if (recomputes) {
    multiply(rows, w13.transposed(), gate_up);
  }
  multiply(grad_out, w2, scratch_rows(scratch.grad_activation));
  activate_backward(forward.data_type, gate_up, scratch);
  if (params.needs.rows) {
    multiply(grad_gate_up, w13, segment(gradients.rows.const_data_ptr(), hidden, hidden));
  }
  if (params.needs.w13_weight) {
    multiply(grad_gate_up.transposed(), rows, gradient_of_weight(gradients.w13_weight));
  }
  if (params.needs.w2_weight) {
    multiply(grad_out.transposed(), scratch_rows(scratch.activation), gradient_of_weight(gradients.w2_weight));
  }
}

/// Expert by expert, since each one's rows are a segment. Rows and weights that no expert reaches get zeros.
void differentiate(const GroupedMlpBackwardParams& params, const GroupedMlpGradients& gradients) {
  const GroupedMlpParams& forward = params.forward;
  const int32_t* offsets = forward.expert_offsets;
  check_expert_offsets(offsets, forward.num_experts, forward.num_rows);
  const Scratch scratch(longest_segment(offsets, forward.num_experts), forward.intermediate_size,
                        params.gate_up == nullptr, gradients.rows);
  const MatrixProduct multiply(gradients.rows);
  for (int64_t expert = 0; expert < forward.num_experts; ++expert) {
    if (offsets[expert] < offsets[expert + 1]) {
      differentiate_expert(params, multiply, expert, scratch, gradients);
    } else {
      zero_rows(gradients.w13_weight, expert, 1);
      zero_rows(gradients.w2_weight, expert, 1);
    }
  }
  zero_rows(gradients.rows, offsets[forward.num_experts], forward.num_rows - offsets[forward.num_experts]);
}

std::tuple<Tensor, Tensor, Tensor> grouped_mlp_backward_on_cpu(const Tensor& grad_out, const Tensor& rows,
                                                               const Tensor& expert_offsets, const Tensor& w13_weight,
                                                               const Tensor& w2_weight,
                                                               const std::optional<Tensor>& gate_up, bool needs_rows,
                                                               bool needs_w13_weight, bool needs_w2_weight) {
  const GroupedMlpNeeds needs{needs_rows, needs_w13_weight, needs_w2_weight};
  const GroupedMlpGradients gradients =
      grouped_mlp_backward(grad_out, rows, expert_offsets, w13_weight, w2_weight, gate_up, needs, &differentiate);
  return {gradients.rows, gradients.w13_weight, gradients.w2_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) { m.impl("grouped_mlp_backward", TORCH_BOX(&grouped_mlp_backward_on_cpu)); }

HIDDEN_NAMESPACE_END(zexpert, ops)
