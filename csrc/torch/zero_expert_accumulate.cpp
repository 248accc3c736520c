// SPDX-License-Identifier: Apache-2.0
#include "torch/zero_expert_accumulate.h"

#include <torch/csrc/stable/library.h>

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

Tensor zero_expert_accumulate_on_cpu(const Tensor& hidden_states, const Tensor& zero_weight) {
  return zero_expert_accumulate(hidden_states, zero_weight, &zero_expert_accumulate_cpu);
}

void zero_expert_accumulate_out_on_cpu(const Tensor& hidden_states, const Tensor& zero_weight, const Tensor& out) {
  zero_expert_accumulate_out(hidden_states, zero_weight, out, &zero_expert_accumulate_cpu);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) {
  m.impl("zero_expert_accumulate", TORCH_BOX(&zero_expert_accumulate_on_cpu));
  m.impl("zero_expert_accumulate.out", TORCH_BOX(&zero_expert_accumulate_out_on_cpu));
}

HIDDEN_NAMESPACE_END(zexpert, ops)
