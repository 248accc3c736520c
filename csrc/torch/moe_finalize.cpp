// SPDX-License-Identifier: Apache-2.0
#include "torch/moe_finalize.h"

#include <torch/csrc/stable/library.h>

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

Tensor moe_finalize_on_cpu(const Tensor& rows, const Tensor& slot_rows, const Tensor& topk_weights,
                           const Tensor& hidden_states, const Tensor& zero_weight,
                           const std::optional<Tensor>& residual, const std::optional<Tensor>& constant_weight,
                           const std::optional<Tensor>& constant_vectors) {
  return moe_finalize(
      {rows, slot_rows, topk_weights, hidden_states, zero_weight, residual, constant_weight, constant_vectors},
      &moe_finalize_cpu);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) { m.impl("moe_finalize", TORCH_BOX(&moe_finalize_on_cpu)); }

HIDDEN_NAMESPACE_END(zexpert, ops)
