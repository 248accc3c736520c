// SPDX-License-Identifier: Apache-2.0
#include "torch/moe_finalize_backward.h"

#include <torch/csrc/stable/library.h>

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_finalize_backward_on_cpu(const Tensor& grad_out, const Tensor& rows,
                                                                        const Tensor& slot_rows,
                                                                        const Tensor& topk_weights,
                                                                        const Tensor& hidden_states,
                                                                        const Tensor& zero_weight) {
  return moe_finalize_backward(grad_out, rows, slot_rows, topk_weights, hidden_states, zero_weight,
                               &moe_finalize_backward_cpu);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) {
  m.impl("moe_finalize_backward", TORCH_BOX(&moe_finalize_backward_on_cpu));
}

HIDDEN_NAMESPACE_END(zexpert, ops)
