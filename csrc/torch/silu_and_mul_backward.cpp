// SPDX-License-Identifier: Apache-2.0
#include "torch/silu_and_mul_backward.h"

#include <torch/csrc/stable/library.h>

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

Tensor silu_and_mul_backward_on_cpu(const Tensor& grad_out, const Tensor& gate_up,
                                    const std::optional<Tensor>& expert_offsets) {
  return silu_and_mul_backward(
      grad_out, gate_up, expert_offsets,
      [](SiluAndMulBackwardParams params, const std::optional<Tensor>& offsets, const Tensor& grad_gate_up) {
        const int64_t num_rows = params.num_rows;
        if (offsets) {
          params.num_rows = last_offset(*offsets, num_rows);
        }
        silu_and_mul_backward_cpu(params);
        zero_rows(grad_gate_up, params.num_rows, num_rows - params.num_rows);
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) {
  m.impl("silu_and_mul_backward", TORCH_BOX(&silu_and_mul_backward_on_cpu));
}

HIDDEN_NAMESPACE_END(zexpert, ops)
