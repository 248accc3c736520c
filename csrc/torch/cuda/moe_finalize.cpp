// SPDX-License-Identifier: Apache-2.0
#include "torch/moe_finalize.h"

#include <torch/csrc/stable/library.h>

#include "torch/cuda/stream.h"
#include "torch/moe_finalize_backward.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

Tensor moe_finalize_on_cuda(const Tensor& rows, const Tensor& slot_rows, const Tensor& topk_weights,
                            const Tensor& hidden_states, const Tensor& zero_weight,
                            const std::optional<Tensor>& residual, const std::optional<Tensor>& constant_weight,
                            const std::optional<Tensor>& constant_vectors) {
  const CurrentDevice device(hidden_states);
  return moe_finalize(
      {rows, slot_rows, topk_weights, hidden_states, zero_weight, residual, constant_weight, constant_vectors},
      [&](const MoeFinalizeParams& params) { moe_finalize_cuda(params, device.stream()); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe_finalize_backward_on_cuda(const Tensor& grad_out, const Tensor& rows,
                                                                         const Tensor& slot_rows,
                                                                         const Tensor& topk_weights,
                                                                         const Tensor& hidden_states,
                                                                         const Tensor& zero_weight) {
  const CurrentDevice device(hidden_states);
  return moe_finalize_backward(grad_out, rows, slot_rows, topk_weights, hidden_states, zero_weight,
                               [&](const MoeFinalizeBackwardParams& params) {
                                 const Tensor row_has_slot = empty({params.num_rows}, DType::Byte, hidden_states);
                                 moe_finalize_backward_cuda(params, row_has_slot.mutable_data_ptr<uint8_t>(),
                                                            device.stream());
                               });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CUDA, m) {
  m.impl("moe_finalize", TORCH_BOX(&moe_finalize_on_cuda));
  m.impl("moe_finalize_backward", TORCH_BOX(&moe_finalize_backward_on_cuda));
}

HIDDEN_NAMESPACE_END(zexpert, ops)
