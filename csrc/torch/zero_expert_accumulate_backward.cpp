// SPDX-License-Identifier: Apache-2.0
#include "torch/zero_expert_accumulate_backward.h"

#include <torch/csrc/stable/library.h>

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

std::tuple<Tensor, Tensor> zero_expert_accumulate_backward_on_cpu(const Tensor& grad_out, const Tensor& hidden_states,
                                                                  const Tensor& zero_weight) {
  return zero_expert_accumulate_backward(grad_out, hidden_states, zero_weight, &zero_expert_accumulate_backward_cpu);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) {
  m.impl("zero_expert_accumulate_backward", TORCH_BOX(&zero_expert_accumulate_backward_on_cpu));
}

HIDDEN_NAMESPACE_END(zexpert, ops)
