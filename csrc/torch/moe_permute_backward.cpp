// SPDX-License-Identifier: Apache-2.0
#include "torch/moe_permute_backward.h"

#include <torch/csrc/stable/library.h>

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

Tensor moe_permute_backward_on_cpu(const Tensor& grad_rows, const Tensor& row_slots, const Tensor& expert_offsets,
                                   int64_t num_tokens, int64_t top_k) {
  return moe_permute_backward(grad_rows, row_slots, expert_offsets, num_tokens, top_k,
                              [](MoePermuteBackwardParams params, const Tensor& offsets) {
                                params.num_rows = last_offset(offsets, params.num_rows);
                                moe_permute_backward_cpu(params);
                              });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) { m.impl("moe_permute_backward", TORCH_BOX(&moe_permute_backward_on_cpu)); }

HIDDEN_NAMESPACE_END(zexpert, ops)
