// SPDX-License-Identifier: Apache-2.0
#include "torch/moe_permute.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "torch/cuda/stream.h"
#include "torch/moe_permute_backward.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

Tensor moe_permute_on_cuda(const Tensor& hidden_states, const Tensor& row_slots, const Tensor& expert_offsets,
                           int64_t top_k, const std::optional<Tensor>& slot_rows) {
  const CurrentDevice device(hidden_states);
  return moe_permute(hidden_states, row_slots, expert_offsets, top_k, slot_rows,
                     [&](const MoePermuteParams& params, const Tensor& offsets) {
                       moe_permute_cuda(params, last_offset_pointer(offsets), device.stream());
                     });
}

Tensor moe_permute_backward_on_cuda(const Tensor& grad_rows, const Tensor& row_slots, const Tensor& expert_offsets,
                                    int64_t num_tokens, int64_t top_k) {
  const CurrentDevice device(grad_rows);
  return moe_permute_backward(grad_rows, row_slots, expert_offsets, num_tokens, top_k,
                              [&](const MoePermuteBackwardParams& params, const Tensor& offsets) {
                                const Tensor slot_rows = empty({num_tokens * top_k}, DType::Int, grad_rows);
                                moe_permute_backward_cuda(params, last_offset_pointer(offsets),
                                                          slot_rows.mutable_data_ptr<int32_t>(), device.stream());
                              });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CUDA, m) {
  m.impl("moe_permute", TORCH_BOX(&moe_permute_on_cuda));
  m.impl("moe_permute_backward", TORCH_BOX(&moe_permute_backward_on_cuda));
}

HIDDEN_NAMESPACE_END(zexpert, ops)
