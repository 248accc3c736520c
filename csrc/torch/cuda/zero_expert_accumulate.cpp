// SPDX-License-Identifier: Apache-2.0
#include "torch/zero_expert_accumulate.h"

#include <torch/csrc/stable/library.h>

#include "torch/cuda/stream.h"
#include "torch/zero_expert_accumulate_backward.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

Tensor zero_expert_accumulate_on_cuda(const Tensor& hidden_states, const Tensor& zero_weight) {
  const CurrentDevice device(hidden_states);
  return zero_expert_accumulate(hidden_states, zero_weight, [&](const ZeroExpertAccumulateParams& params) {
    zero_expert_accumulate_cuda(params, device.stream());
  });
}

void zero_expert_accumulate_out_on_cuda(const Tensor& hidden_states, const Tensor& zero_weight, const Tensor& out) {
  const CurrentDevice device(hidden_states);
  zero_expert_accumulate_out(hidden_states, zero_weight, out, [&](const ZeroExpertAccumulateParams& params) {
    zero_expert_accumulate_cuda(params, device.stream());
  });
}

std::tuple<Tensor, Tensor> zero_expert_accumulate_backward_on_cuda(const Tensor& grad_out, const Tensor& hidden_states,
                                                                   const Tensor& zero_weight) {
  const CurrentDevice device(hidden_states);
  return zero_expert_accumulate_backward(grad_out, hidden_states, zero_weight,
                                         [&](const ZeroExpertAccumulateBackwardParams& params) {
                                           zero_expert_accumulate_backward_cuda(params, device.stream());
                                         });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CUDA, m) {
  m.impl("zero_expert_accumulate", TORCH_BOX(&zero_expert_accumulate_on_cuda));
  m.impl("zero_expert_accumulate.out", TORCH_BOX(&zero_expert_accumulate_out_on_cuda));
  m.impl("zero_expert_accumulate_backward", TORCH_BOX(&zero_expert_accumulate_backward_on_cuda));
}

HIDDEN_NAMESPACE_END(zexpert, ops)
