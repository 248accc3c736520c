// SPDX-License-Identifier: Apache-2.0
#include "torch/grouped_mlp_backward.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/expert_products.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

std::tuple<Tensor, Tensor, Tensor> grouped_mlp_backward_on_cpu(const Tensor& grad_out, const Tensor& rows,
                                                               const Tensor& expert_offsets, const Tensor& w13_weight,
                                                               const Tensor& w2_weight,
                                                               const std::optional<Tensor>& gate_up, bool needs_rows,
                                                               bool needs_w13_weight, bool needs_w2_weight) {
  const GroupedMlpNeeds needs{needs_rows, needs_w13_weight, needs_w2_weight};
  const GroupedMlpGradients gradients =
      grouped_mlp_backward(grad_out, rows, expert_offsets, w13_weight, w2_weight, gate_up, needs,
                           [](const GroupedMlpBackwardParams& params, const GroupedMlpGradients& results) {
                             differentiate_experts(params, nullptr, results);
                           });
  return {gradients.rows, gradients.w13_weight, gradients.w2_weight};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) { m.impl("grouped_mlp_backward", TORCH_BOX(&grouped_mlp_backward_on_cpu)); }

HIDDEN_NAMESPACE_END(zexpert, ops)
