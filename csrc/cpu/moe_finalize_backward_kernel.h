// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by moe_finalize_backward.cpp through for_each_isa.h, with the part below, which
// like this file includes nothing else.
#include "cpu/scale_and_dot.h"

template <typename T>
void moe_finalize_backward(const MoeFinalizeBackwardParams& params) {
  using A = accumulate_t<T>;
  // Below this many elements a range costs less than waking a thread.
  constexpr int64_t kGrainElements = 16384;
  const int64_t size = params.hidden_size;
  const int64_t grain_size = std::max<int64_t>(kGrainElements / std::max<int64_t>(size * (params.top_k + 1), 1), 1);
  parallel_for(0, params.num_tokens, grain_size, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const T* grad_out = static_cast<const T*>(params.grad_out) + token * params.grad_out_row_stride;
      const A* topk_weights = static_cast<const A*>(params.topk_weights) + token * params.top_k;
      const int32_t* slot_rows = params.slot_rows + token * params.top_k;
      A* grad_topk_weights = static_cast<A*>(params.grad_topk_weights) + token * params.top_k;
      for (int64_t k = 0; k < params.top_k; ++k) {
        if (slot_rows[k] < 0) {
          grad_topk_weights[k] = 0;
          continue;
        }
        const T* row = static_cast<const T*>(params.rows) + slot_rows[k] * params.rows_row_stride;
        T* grad_row = static_cast<T*>(params.grad_rows) + slot_rows[k] * size;
        grad_topk_weights[k] = scale_and_dot(grad_out, topk_weights[k], row, size, grad_row);
      }
      const A zero_weight = static_cast<const A*>(params.zero_weight)[token];
      const T* hidden_states = static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride;
      T* grad_hidden_states = static_cast<T*>(params.grad_hidden_states) + token * size;
      static_cast<A*>(params.grad_zero_weight)[token] =
          scale_and_dot(grad_out, zero_weight, hidden_states, size, grad_hidden_states);
    }
  });
}
