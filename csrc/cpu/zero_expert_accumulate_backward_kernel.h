// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by zero_expert_accumulate_backward.cpp through for_each_isa.h, with the part below,
// which like this file includes nothing else.
#include "cpu/scale_and_dot.h"

template <typename T>
void zero_expert_accumulate_backward(const ZeroExpertAccumulateBackwardParams& params) {
  using A = accumulate_t<T>;
  // Below this many elements a range costs less than waking a thread.
  constexpr int64_t kGrainElements = 32768;
  const auto* grad_out = static_cast<const T*>(params.grad_out);
  const auto* hidden_states = static_cast<const T*>(params.hidden_states);
  const auto* zero_weight = static_cast<const A*>(params.zero_weight);
  auto* grad_hidden_states = static_cast<T*>(params.grad_hidden_states);
  auto* grad_zero_weight = static_cast<A*>(params.grad_zero_weight);
  const int64_t size = params.hidden_size;
  const int64_t grain_size = std::max<int64_t>(kGrainElements / std::max<int64_t>(size, 1), 1);
  parallel_for(0, params.num_tokens, grain_size, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      grad_zero_weight[token] =
          scale_and_dot(grad_out + token * params.grad_out_row_stride, zero_weight[token],
                        hidden_states + token * params.hidden_row_stride, size, grad_hidden_states + token * size);
    }
  });
}
