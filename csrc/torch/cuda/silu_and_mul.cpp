// SPDX-License-Identifier: Apache-2.0
#include "torch/silu_and_mul.h"

#include <torch/csrc/stable/library.h>

#include "torch/cuda/stream.h"
#include "torch/silu_and_mul_backward.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

Tensor silu_and_mul_on_cuda(const Tensor& gate_up, const std::optional<Tensor>& expert_offsets) {
  const CurrentDevice device(gate_up);
  return silu_and_mul(gate_up, expert_offsets,
                      [&](const SiluAndMulParams& params, const std::optional<Tensor>& offsets) {
                        silu_and_mul_cuda(params, offsets ? last_offset_pointer(*offsets) : nullptr, device.stream());
                      });
}

Tensor silu_and_mul_backward_on_cuda(const Tensor& grad_out, const Tensor& gate_up,
                                     const std::optional<Tensor>& expert_offsets) {
  const CurrentDevice device(gate_up);
  return silu_and_mul_backward(
      grad_out, gate_up, expert_offsets,
      [&](const SiluAndMulBackwardParams& params, const std::optional<Tensor>& offsets, const Tensor&) {
        silu_and_mul_backward_cuda(params, offsets ? last_offset_pointer(*offsets) : nullptr, device.stream());
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CUDA, m) {
  m.impl("silu_and_mul", TORCH_BOX(&silu_and_mul_on_cuda));
  m.impl("silu_and_mul_backward", TORCH_BOX(&silu_and_mul_backward_on_cuda));
}

HIDDEN_NAMESPACE_END(zexpert, ops)
