// SPDX-License-Identifier: Apache-2.0
#include "torch/silu_and_mul.h"

#include <torch/csrc/stable/library.h>

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

Tensor silu_and_mul_on_cpu(const Tensor& gate_up, const std::optional<Tensor>& expert_offsets) {
  return silu_and_mul(gate_up, expert_offsets, [](SiluAndMulParams params, const std::optional<Tensor>& offsets) {
    if (offsets) {
      params.num_rows = last_offset(*offsets, params.num_rows);
    }
    silu_and_mul_cpu(params);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) { m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul_on_cpu)); }

HIDDEN_NAMESPACE_END(zexpert, ops)
