// grouped_mlp on the CPU: experts with few rows in one call of zexpert's kernel, which streams their weights; experts
// with many rows one by one through torch's matrix product, which packs them. grouped_mlp_with_gate_up, the forward of
// training, takes them all through torch's.
#include "torch/grouped_mlp.h"

#include <torch/csrc/stable/library.h>

#include "cpu/expert_offsets.h"
#include "torch/matrix_product.h"
#include "zexpert/silu_and_mul.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

void activate(const GroupedMlpParams& params, const Matrix& gate_up, void* activation) {
  SiluAndMulParams activation_params;
  activation_params.gate_up = gate_up.data;
  activation_params.out = activation;
  activation_params.data_type = params.data_type;
  activation_params.num_rows = gate_up.num_rows;
  activation_params.intermediate_size = params.intermediate_size;
  activation_params.gate_up_row_stride = gate_up.row_stride;
  activation_params.out_row_stride = params.intermediate_size;
  silu_and_mul_cpu(activation_params);
}

/// Every segment of more than min_rows rows. Row r of gate_up is that of row r of params.rows if `keeps_gate_up`; else
/// gate_up is scratch with as many rows as the longest segment.
void multiply_segments(const GroupedMlpParams& params, int64_t min_rows, const Tensor& gate_up, bool keeps_gate_up) {
  const int64_t hidden = params.hidden_size;
  const int64_t inner = params.intermediate_size;
  const MatrixProduct multiply(gate_up);
  const Tensor activation_scratch =
      empty({longest_segment(params.expert_offsets, params.num_experts), inner}, gate_up.scalar_type(), gate_up);
  void* const activation_data = activation_scratch.mutable_data_ptr();
  for (int64_t expert = 0; expert < params.num_experts; ++expert) {
    const int64_t first = params.expert_offsets[expert];
    const int64_t num_rows = params.expert_offsets[expert + 1] - first;
    if (num_rows <= min_rows) {
      continue;
    }
    const Matrix rows =
        multiply.matrix(params.rows, first * params.rows_row_stride, num_rows, hidden, params.rows_row_stride);
    const Matrix w13 = multiply.matrix(params.w13_weight, expert * params.w13_expert_stride, 2 * inner, hidden, hidden);
    const Matrix w2 = multiply.matrix(params.w2_weight, expert * params.w2_expert_stride, hidden, inner, inner);
    const Matrix segment_gate_up = multiply.matrix(
        gate_up.const_data_ptr(), keeps_gate_up ? first * gate_up.stride(0) : 0, num_rows, 2 * inner, 2 * inner);
    const Matrix activation = multiply.matrix(activation_data, 0, num_rows, inner, inner);
    const Matrix out =
        multiply.matrix(params.out, first * params.out_row_stride, num_rows, hidden, params.out_row_stride);

    multiply(rows, w13.transposed(), segment_gate_up);
    activate(params, segment_gate_up, activation_data);
    multiply(activation, w2.transposed(), out);
  }
}

Tensor grouped_mlp_on_cpu(const Tensor& rows, const Tensor& expert_offsets, const Tensor& w13_weight,
                          const Tensor& w2_weight) {
  return grouped_mlp(rows, expert_offsets, w13_weight, w2_weight, [](GroupedMlpParams params, const Tensor& out) {
    // torch's product takes no empty matrix.
    params.max_rows =
        params.intermediate_size == 0 ? params.num_rows : few_rows_limit(params.data_type, cpu_capability());
    grouped_mlp_cpu(params);
    const int64_t longest = longest_segment(params.expert_offsets, params.num_experts);
    if (longest > params.max_rows) {
      const Tensor scratch = empty({longest, 2 * params.intermediate_size}, out.scalar_type(), out);
      multiply_segments(params, params.max_rows, scratch, false);
    }
  });
}

std::tuple<Tensor, Tensor> grouped_mlp_with_gate_up_on_cpu(const Tensor& rows, const Tensor& expert_offsets,
                                                           const Tensor& w13_weight, const Tensor& w2_weight) {
  return grouped_mlp_with_gate_up(rows, expert_offsets, w13_weight, w2_weight,
                                  [](const GroupedMlpParams& params, const Tensor& gate_up) {
                                    check_expert_offsets(params.expert_offsets, params.num_experts, params.num_rows);
                                    if (params.intermediate_size == 0) {
                                      grouped_mlp_cpu(params);
                                    } else if (params.hidden_size == 0) {
                                      Tensor sums_of_nothing = gate_up;
                                      torch::stable::zero_(sums_of_nothing);
                                    } else {
                                      multiply_segments(params, 0, gate_up, true);
                                    }
                                  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) {
  m.impl("grouped_mlp", TORCH_BOX(&grouped_mlp_on_cpu));
  m.impl("grouped_mlp_with_gate_up", TORCH_BOX(&grouped_mlp_with_gate_up_on_cpu));
}

HIDDEN_NAMESPACE_END(zexpert, ops)
