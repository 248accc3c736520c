// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by moe_permute_backward.cpp through for_each_isa.h.

/// target = the sum of the rows; accumulators stay in registers.
template <typename T>
void sum_rows(const T* rows, int64_t row_stride, const int32_t* indices, int64_t num_indices, int64_t size, T* target) {
  using V = Vec<accumulate_t<T>>;
  constexpr int64_t kVectors = 8;
  int64_t column = 0;
  for (; column + kVectors * V::kWidth <= size; column += kVectors * V::kWidth) {
    V sums[kVectors];
    for (V& sum : sums) sum = V::zero();
    for (int64_t i = 0; i < num_indices; ++i) {
      const T* source = rows + indices[i] * row_stride + column;
      for (int64_t v = 0; v < kVectors; ++v) sums[v] = sums[v] + V::load(source + v * V::kWidth);
    }
    for (int64_t v = 0; v < kVectors; ++v) sums[v].store(target + column + v * V::kWidth);
  }
  for (; column < size; column += V::kWidth) {
    const int64_t count = std::min(V::kWidth, size - column);
    V sum = V::zero();
    for (int64_t i = 0; i < num_indices; ++i) {
      sum = sum + V::load_partial(rows + indices[i] * row_stride + column, count, 0);
    }
    sum.store_partial(target + column, count);
  }
}

template <typename T>
void moe_permute_backward(const MoePermuteBackwardParams& params, const SlotRows& slot_rows) {
  // Below this many elements a range costs less than waking a thread.
  constexpr int64_t kGrainElements = 32768;
  const auto* grad_rows = static_cast<const T*>(params.grad_rows);
  auto* grad_hidden_states = static_cast<T*>(params.grad_hidden_states);
  const int64_t rows_per_token = params.num_rows / params.num_tokens + 1;
  const int64_t grain_size = std::max<int64_t>(kGrainElements / (params.hidden_size * rows_per_token), 1);
  parallel_for(0, params.num_tokens, grain_size, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t first = slot_rows.offsets[static_cast<size_t>(token * params.top_k)];
      const int64_t last = slot_rows.offsets[static_cast<size_t>((token + 1) * params.top_k)];
      sum_rows(grad_rows, params.grad_rows_row_stride, slot_rows.rows.data() + first, last - first, params.hidden_size,
               grad_hidden_states + token * params.hidden_size);
    }
  });
}
