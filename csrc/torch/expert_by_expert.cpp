// SPDX-License-Identifier: Apache-2.0
#include "torch/expert_by_expert.h"

#include "cpu/check_params.h"
#include "cpu/expert_offsets.h"
#include "torch/expert_matrices.h"
#include "torch/matrix_product.h"
#include "zexpert/moe_permute.h"
#include "zexpert/silu_and_mul.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

void activate(ScalarType data_type, const Matrix& gate_up, void* activation) {
  SiluAndMulParams params;
  params.gate_up = gate_up.data;
  params.out = activation;
  params.data_type = data_type;
  params.num_rows = gate_up.num_rows;
  params.intermediate_size = gate_up.num_columns / 2;
  params.gate_up_row_stride = gate_up.row_stride;
  params.out_row_stride = params.intermediate_size;
  silu_and_mul_cpu(params);
}

/// Copies the tokens of rows `first` .. first + count - 1, which are in `tokens`, to `target`.
void gather_tokens(const GroupedMlpParams& mlp, const void* tokens, int64_t row_stride, int64_t first, int64_t count,
                   void* target) {
  MoePermuteParams params;
  params.hidden_states = tokens;
  params.row_slots = mlp.row_slots + first;
  params.rows = target;
  params.data_type = mlp.data_type;
  params.num_rows = count;
  params.num_tokens = mlp.num_tokens;
  params.top_k = mlp.top_k;
  params.hidden_size = mlp.hidden_size;
  params.hidden_row_stride = row_stride;
  moe_permute_cpu(params);
}

/// Runs every expert with more than min_rows rows. Row r of gate_up belongs to row r of params.rows if `keeps_gate_up`;
/// else gate_up is scratch with as many rows as the longest segment. No size may be 0.
void multiply_experts(const GroupedMlpParams& params, const ExpertWeights& weights, int64_t min_rows,
                      const Tensor& gate_up, bool keeps_gate_up) {
  const int64_t hidden = params.hidden_size;
  const int64_t inner = params.intermediate_size;
  const bool gathers = params.row_slots != nullptr;
  const MatrixProduct multiply(gate_up);
  const int64_t longest = longest_segment(params.expert_offsets, params.num_experts);
  const Tensor activation_scratch = empty({longest, inner}, gate_up.scalar_type(), gate_up);
  const Tensor rows_scratch = empty({gathers ? longest : 0, hidden}, gate_up.scalar_type(), gate_up);
  void* const activation_data = activation_scratch.mutable_data_ptr();
  void* const rows_data = rows_scratch.mutable_data_ptr();
  const on_cpu::ExpertMatrices w13_of(weights.gate_up(), gate_up);
  const on_cpu::ExpertMatrices w2_of(weights.down(), gate_up);
  for (int64_t expert = 0; expert < params.num_experts; ++expert) {
    const int64_t first = params.expert_offsets[expert];
    const int64_t num_rows = params.expert_offsets[expert + 1] - first;
    if (num_rows <= min_rows) {
      continue;
    }
    if (gathers) {
      gather_tokens(params, params.rows, params.rows_row_stride, first, num_rows, rows_data);
    }
    const Matrix rows = gathers ? multiply.matrix(rows_data, 0, num_rows, hidden, hidden)
                                : multiply.matrix(params.rows, first * params.rows_row_stride, num_rows, hidden,
                                                  params.rows_row_stride);
    const Matrix segment_gate_up = multiply.matrix(
        gate_up.const_data_ptr(), keeps_gate_up ? first * gate_up.stride(0) : 0, num_rows, 2 * inner, 2 * inner);
    const Matrix activation = multiply.matrix(activation_data, 0, num_rows, inner, inner);
    const Matrix out =
        multiply.matrix(params.out, first * params.out_row_stride, num_rows, hidden, params.out_row_stride);

    multiply(rows, w13_of(expert).transposed(), segment_gate_up);
    activate(params.data_type, segment_gate_up, activation_data);
    multiply(activation, w2_of(expert).transposed(), out);
  }
}

/// Memory for one expert's rows, written anew for every expert.
struct Scratch {
  Scratch(const ExpertInputs& inputs, const ExpertGradientInputs& given) {
    const Tensor& like = inputs.rows;
    const int64_t num_rows = longest_segment(inputs.expert_offsets.const_data_ptr<int32_t>(), inputs.num_experts());
    const int64_t hidden = inputs.hidden_size();
    const int64_t inner = inputs.intermediate_size();
    const DType data = like.scalar_type();
    const int64_t num_gathered = inputs.row_slots ? num_rows : 0;
    gate_up = empty({given.gate_up ? 0 : num_rows, 2 * inner}, data, like);
    activation = empty({num_rows, inner}, data, like);
    grad_activation = empty({num_rows, inner}, data, like);
    grad_gate_up = empty({num_rows, 2 * inner}, data, like);
    rows = empty({num_gathered, hidden}, data, like);
    grad_out = empty({num_gathered, hidden}, data, like);
    row_weight = empty({num_gathered}, weight_dtype(data), like);
    grad_row_weight = empty({num_gathered}, weight_dtype(data), like);
  }

  Tensor gate_up, activation, grad_activation, grad_gate_up;
  Tensor rows, grad_out, row_weight, grad_row_weight;  ///< of tokens
};

/// The derivatives of one expert after another.
class ExpertDerivatives {
 public:
  ExpertDerivatives(const ExpertInputs& inputs, const ExpertGradientInputs& given, const ExpertGradients& gradients)
      : given_(given),
        forward_(inputs.params()),
        gradients_(gradients),
        multiply_(inputs.rows),
        w13_of_(inputs.weights.gate_up(), inputs.rows),
        w2_of_(inputs.weights.down(), inputs.rows),
        scratch_(inputs, given) {}

  void differentiate(int64_t expert) {
    first_ = forward_.expert_offsets[expert];
    num_rows_ = forward_.expert_offsets[expert + 1] - first_;
    const int64_t hidden = forward_.hidden_size;
    const int64_t inner = forward_.intermediate_size;
    const Matrix rows = rows_or_tokens(forward_.rows, forward_.rows_row_stride, scratch_.rows);
    const Matrix grad_out =
        rows_or_tokens(given_.grad_out.const_data_ptr(), given_.grad_out.stride(0), scratch_.grad_out);
    const Matrix w13 = w13_of_(expert);
    const Matrix w2 = w2_of_(expert);
    const Matrix grad_gate_up = scratch_rows(scratch_.grad_gate_up);
    const Matrix gate_up = given_.gate_up
                               ? segment(given_.gate_up->const_data_ptr(), 2 * inner, given_.gate_up->stride(0))
                               : scratch_rows(scratch_.gate_up);

    if (!given_.gate_up) {
      multiply_(rows, w13.transposed(), gate_up);
    }
    multiply_(grad_out, w2, scratch_rows(scratch_.grad_activation));
    gather_row_weights();
    activate_backward(gate_up);
    scatter_grad_row_weights();
    if (given_.needs.rows) {
      multiply_(grad_gate_up, w13, segment(gradients_.rows.const_data_ptr(), hidden, hidden));
    }
    if (given_.needs.w13_weight) {
      multiply_(grad_gate_up.transposed(), rows, gradient_of_weight(gradients_.w13_weight, expert));
    }
    if (given_.needs.w2_weight) {
      const Matrix activation = scratch_rows(scratch_.activation);
      multiply_(grad_out.transposed(), activation, gradient_of_weight(gradients_.w2_weight, expert));
    }
  }

 private:
  /// The expert's rows of a matrix that has all experts'.
  Matrix segment(const void* base, int64_t num_columns, int64_t row_stride) const {
    return multiply_.matrix(base, first_ * row_stride, num_rows_, num_columns, row_stride);
  }

  Matrix scratch_rows(const Tensor& tensor) const {
    return multiply_.matrix(tensor.const_data_ptr(), 0, num_rows_, tensor.size(1), tensor.size(1));
  }

  Matrix gradient_of_weight(const Tensor& tensor, int64_t expert) const {
    return multiply_.matrix(tensor.const_data_ptr(), expert * tensor.stride(0), tensor.size(1), tensor.size(2),
                            tensor.size(2));
  }

  /// The expert's rows of `base`, gathered into `scratch` if that has a row per token.
  Matrix rows_or_tokens(const void* base, int64_t row_stride, const Tensor& scratch) const {
    if (forward_.row_slots == nullptr) {
      return segment(base, forward_.hidden_size, row_stride);
    }
    gather_tokens(forward_, base, row_stride, first_, num_rows_, scratch.mutable_data_ptr());
    return scratch_rows(scratch);
  }

  /// Writes scratch_.grad_gate_up from scratch_.grad_activation, and scratch_.activation on the way.
  void activate_backward(const Matrix& gate_up) const {
    SiluAndMulBackwardParams params;
    params.grad_out = scratch_.grad_activation.const_data_ptr();
    params.gate_up = gate_up.data;
    params.grad_gate_up = scratch_.grad_gate_up.mutable_data_ptr();
    params.out = scratch_.activation.mutable_data_ptr();
    if (given_.topk_weights) {
      params.row_weight = scratch_.row_weight.const_data_ptr();
      params.grad_row_weight = scratch_.grad_row_weight.mutable_data_ptr();
    }
    params.data_type = forward_.data_type;
    params.num_rows = num_rows_;
    params.intermediate_size = forward_.intermediate_size;
    params.grad_out_row_stride = params.intermediate_size;
    params.gate_up_row_stride = gate_up.row_stride;
    params.grad_gate_up_row_stride = 2 * params.intermediate_size;
    params.out_row_stride = params.intermediate_size;
    silu_and_mul_backward_cpu(params);
  }

  void gather_row_weights() const {
    if (given_.topk_weights) {
      visit_floating(element_type(scratch_.row_weight), [&](auto element) {
        using Weight = decltype(element);
        const auto* topk_weights = static_cast<const Weight*>(given_.topk_weights->const_data_ptr());
        auto* row_weight = static_cast<Weight*>(scratch_.row_weight.mutable_data_ptr());
        for (int64_t r = 0; r < num_rows_; ++r) row_weight[r] = topk_weights[forward_.row_slots[first_ + r]];
      });
    }
  }

  void scatter_grad_row_weights() const {
    if (given_.topk_weights) {
      visit_floating(element_type(scratch_.row_weight), [&](auto element) {
        using Weight = decltype(element);
        const auto* grad_row_weight = static_cast<const Weight*>(scratch_.grad_row_weight.const_data_ptr());
        auto* grad_topk_weights = static_cast<Weight*>(gradients_.topk_weights.mutable_data_ptr());
        for (int64_t r = 0; r < num_rows_; ++r) grad_topk_weights[forward_.row_slots[first_ + r]] = grad_row_weight[r];
      });
    }
  }

  const ExpertGradientInputs& given_;
  const GroupedMlpParams forward_;
  const ExpertGradients& gradients_;
  MatrixProduct multiply_;
  on_cpu::ExpertMatrices w13_of_;
  on_cpu::ExpertMatrices w2_of_;
  Scratch scratch_;
  int64_t first_ = 0;  ///< the current expert's first row
  int64_t num_rows_ = 0;
};

}  // namespace

void run_expert_by_expert(const ExpertInputs& inputs, const Tensor& out) {
  GroupedMlpParams params = inputs.params();
  params.out = out.mutable_data_ptr();
  params.out_row_stride = out.stride(0);
  // PyTorch's product accepts no empty matrix.
  const int64_t max_rows = params.intermediate_size == 0
                               ? params.num_rows
                               : few_rows_limit(params.data_type, cpu_capability(), params.has_fp8_weights());
  grouped_mlp_cpu(params, max_rows);
  const int64_t longest = longest_segment(params.expert_offsets, params.num_experts);
  if (longest > max_rows) {
    const Tensor scratch = empty({longest, 2 * params.intermediate_size}, out.scalar_type(), out);
    multiply_experts(params, inputs.weights, max_rows, scratch, false);
  }
}

void run_expert_by_expert_keeping_gate_up(const ExpertInputs& inputs, const Tensor& out, const Tensor& gate_up) {
  GroupedMlpParams params = inputs.params();
  params.out = out.mutable_data_ptr();
  params.out_row_stride = out.stride(0);
  check_expert_rows(params);
  if (params.intermediate_size == 0) {
    grouped_mlp_cpu(params);
  } else if (params.hidden_size == 0) {
    zero_rows(gate_up, 0, gate_up.size(0));
  } else {
    multiply_experts(params, inputs.weights, 0, gate_up, true);
  }
}

void differentiate_expert_by_expert(const ExpertInputs& inputs, const ExpertGradientInputs& gradient_inputs,
                                    const ExpertGradients& gradients) {
  const GroupedMlpParams forward = inputs.params();
  const int32_t* offsets = forward.expert_offsets;
  check_expert_rows(forward);
  ExpertDerivatives derivatives(inputs, gradient_inputs, gradients);
  for (int64_t expert = 0; expert < forward.num_experts; ++expert) {
    if (offsets[expert] < offsets[expert + 1]) {
      derivatives.differentiate(expert);
    } else {
      zero_rows(gradients.w13_weight, expert, 1);
      zero_rows(gradients.w2_weight, expert, 1);
    }
  }
  zero_rows(gradients.rows, offsets[forward.num_experts], forward.num_rows - offsets[forward.num_experts]);
}

HIDDEN_NAMESPACE_END(zexpert, ops)
