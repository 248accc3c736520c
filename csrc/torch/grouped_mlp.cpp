// SPDX-License-Identifier: Apache-2.0
// grouped_mlp on the CPU: experts with few rows in one call of zexpert's kernel, which streams their weights; experts
// with many rows one by one through torch's matrix product, which packs them. grouped_mlp_with_gate_up, the forward of
// training, takes them all through torch's.
#include "torch/grouped_mlp.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "cpu/expert_offsets.h"
#include "torch/expert_products.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

Tensor grouped_mlp_on_cpu(const Tensor& rows, const Tensor& expert_offsets, const Tensor& w13_weight,
                          const Tensor& w2_weight, const std::optional<Tensor>& row_slots, int64_t top_k) {
  const auto launch = [](GroupedMlpParams params, const Tensor& out) {
    // torch's product takes no empty matrix.
    params.max_rows =
        params.intermediate_size == 0 ? params.num_rows : few_rows_limit(params.data_type, cpu_capability());
    grouped_mlp_cpu(params);
    const int64_t longest = longest_segment(params.expert_offsets, params.num_experts);
    if (longest > params.max_rows) {
      const Tensor scratch = empty({longest, 2 * params.intermediate_size}, out.scalar_type(), out);
      multiply_experts(params, params.max_rows, scratch, false);
    }
  };
  return grouped_mlp(rows, expert_offsets, w13_weight, w2_weight, launch, {row_slots, top_k});
}

std::tuple<Tensor, Tensor> grouped_mlp_with_gate_up_on_cpu(const Tensor& rows, const Tensor& expert_offsets,
                                                           const Tensor& w13_weight, const Tensor& w2_weight) {
  return grouped_mlp_with_gate_up(rows, expert_offsets, w13_weight, w2_weight, &run_experts_keeping_gate_up);
}

bool is_hopper_on_cpu(const Tensor& /*tensor*/) { return false; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) {
  m.impl("grouped_mlp", TORCH_BOX(&grouped_mlp_on_cpu));
  m.impl("grouped_mlp_with_gate_up", TORCH_BOX(&grouped_mlp_with_gate_up_on_cpu));
  m.impl("is_hopper", TORCH_BOX(&is_hopper_on_cpu));
}

HIDDEN_NAMESPACE_END(zexpert, ops)
