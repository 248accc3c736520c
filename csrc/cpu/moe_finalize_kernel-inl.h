// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by moe_finalize.cpp through for_each_isa.h.

/// One addend of a token's output: weight * row.
template <typename T>
struct WeightedRow {
  const T* row;
  accumulate_t<T> weight;
};

/// The addends of one token in the order of the sum. Returns their number.
template <typename T>
int64_t gather_addends(const MoeFinalizeParams& params, int64_t token, WeightedRow<T>* addends) {
  using A = accumulate_t<T>;
  int64_t count = 0;
  const auto* topk_weights = static_cast<const A*>(params.topk_weights);
  for (int64_t slot = token * params.top_k; slot < (token + 1) * params.top_k; ++slot) {
    const int64_t row = params.slot_rows[slot];
    if (row >= 0) {
      addends[count++] = {static_cast<const T*>(params.rows) + row * params.rows_row_stride,
                          topk_weights != nullptr ? topk_weights[slot] : A(1)};
    }
  }
  if (params.zero_weight != nullptr) {
    addends[count++] = {static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride,
                        static_cast<const A*>(params.zero_weight)[token]};
  }
  for (int64_t c = 0; c < params.num_constant_experts; ++c) {
    addends[count++] = {static_cast<const T*>(params.constant_vectors) + c * params.constant_row_stride,
                        static_cast<const A*>(params.constant_weight)[token * params.num_constant_experts + c]};
  }
  if (params.residual != nullptr) {
    addends[count++] = {static_cast<const T*>(params.residual) + token * params.residual_row_stride, A(1)};
  }
  return count;
}

/// out[begin, end) = the weighted sum of the addends' columns [begin, end); accumulators stay in registers.
template <typename T>
void sum_columns(const WeightedRow<T>* addends, int64_t num_addends, int64_t begin, int64_t end, T* out) {
  using V = Vec<accumulate_t<T>>;
  constexpr int64_t kVectors = 8;
  int64_t column = begin;
  for (; column + kVectors * V::kWidth <= end; column += kVectors * V::kWidth) {
    V sums[kVectors];
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) sums[v] = V::zero();
    for (int64_t i = 0; i < num_addends; ++i) {
      const V weight = V::broadcast(addends[i].weight);
      const T* source = addends[i].row + column;
#pragma GCC unroll 8
      for (int64_t v = 0; v < kVectors; ++v) {
        sums[v] = V::multiply_add(weight, V::load(source + v * V::kWidth), sums[v]);
      }
    }
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) sums[v].store(out + column + v * V::kWidth);
  }
  for (; column < end; column += V::kWidth) {
    const int64_t count = std::min(V::kWidth, end - column);
    V sum = V::zero();
    for (int64_t i = 0; i < num_addends; ++i) {
      const V weight = V::broadcast(addends[i].weight);
      sum = V::multiply_add(weight, V::load_partial(addends[i].row + column, count, 0), sum);
    }
    sum.store_partial(out + column, count);
  }
}

template <typename T>
void moe_finalize(const MoeFinalizeParams& params) {
  // Tokens are cut into blocks of columns so that a few wide tokens use every thread. Below kGrainElements addends
  // a range costs less than waking a thread.
  constexpr int64_t kColumns = 1024;
  constexpr int64_t kGrainElements = 32768;
  const int64_t max_addends = params.top_k + params.num_constant_experts + 2;
  const int64_t num_blocks = (params.hidden_size + kColumns - 1) / kColumns;
  const int64_t block_elements = std::min(params.hidden_size, kColumns) * max_addends;
  const int64_t grain_size = std::max<int64_t>(kGrainElements / block_elements, 1);
  auto* out = static_cast<T*>(params.out);
  parallel_for(0, params.num_tokens * num_blocks, grain_size, [&](int64_t begin, int64_t end) {
    std::vector<WeightedRow<T>> addends(static_cast<size_t>(max_addends));
    int64_t num_addends = 0;
    int64_t gathered_token = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t token = item / num_blocks;
      const int64_t column = item % num_blocks * kColumns;
      if (token != gathered_token) {
        num_addends = gather_addends(params, token, addends.data());
        gathered_token = token;
      }
      sum_columns(addends.data(), num_addends, column, std::min(column + kColumns, params.hidden_size),
                  out + token * params.out_row_stride);
    }
  });
}

/// target = weight * source, added to `addend` if kAdds; `target` may be `source` or `addend`.
template <bool kAdds, typename T>
ZEXPERT_INLINE void scale_row(const T* source, accumulate_t<T> weight, const T* addend, int64_t size, T* target) {
  using V = Vec<accumulate_t<T>>;
  const V scale = V::broadcast(weight);
  int64_t i = 0;
  for (; i + V::kWidth <= size; i += V::kWidth) {
    V value = scale * V::load(source + i);
    if constexpr (kAdds) {
      value = V::multiply_add(scale, V::load(source + i), V::load(addend + i));
    }
    value.store(target + i);
  }
  if (i < size) {
    V value = scale * V::load_partial(source + i, size - i, 0);
    if constexpr (kAdds) {
      value =
          V::multiply_add(scale, V::load_partial(source + i, size - i, 0), V::load_partial(addend + i, size - i, 0));
    }
    value.store_partial(target + i, size - i);
  }
}

/// The zero part without slots and constants, added to the residual if there is one.
template <typename T>
void scale_hidden_states(const MoeFinalizeParams& params) {
  // Below this many elements a range costs less than waking a thread.
  constexpr int64_t kGrainElements = 32768;
  const auto* zero_weight = static_cast<const accumulate_t<T>*>(params.zero_weight);
  const int64_t grain_size = std::max<int64_t>(kGrainElements / params.hidden_size, 1);
  parallel_for(0, params.num_tokens, grain_size, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const T* source = static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride;
      T* target = static_cast<T*>(params.out) + token * params.out_row_stride;
      if (params.residual != nullptr) {
        const T* residual = static_cast<const T*>(params.residual) + token * params.residual_row_stride;
        scale_row<true>(source, zero_weight[token], residual, params.hidden_size, target);
      } else {
        scale_row<false>(source, zero_weight[token], source, params.hidden_size, target);
      }
    }
  });
}

/// Returns <gradient, row>; if kScales, also target = weight * gradient in the same pass.
template <bool kScales, typename T>
ZEXPERT_INLINE accumulate_t<T> scale_and_dot(const T* gradient, accumulate_t<T> weight, const T* row, int64_t size,
                                             T* target) {
  using V = Vec<accumulate_t<T>>;
  // 64 sums whatever the register: no addition waits for the one before, and rounding errors stay small.
  constexpr int64_t kVectors = 64 / V::kWidth;
  const V scale = V::broadcast(weight);
  V sums[static_cast<size_t>(kVectors)];
  for (V& sum : sums) sum = V::zero();
  int64_t i = 0;
  for (; i + kVectors * V::kWidth <= size; i += kVectors * V::kWidth) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const V g = V::load(gradient + i + v * V::kWidth);
      sums[v] = V::multiply_add(g, V::load(row + i + v * V::kWidth), sums[v]);
      if constexpr (kScales) {
        (scale * g).store(target + i + v * V::kWidth);
      }
    }
  }
  for (; i < size; i += V::kWidth) {
    const int64_t count = std::min(V::kWidth, size - i);
    const V g = V::load_partial(gradient + i, count, 0);
    sums[0] = V::multiply_add(g, V::load_partial(row + i, count, 0), sums[0]);
    if constexpr (kScales) {
      (scale * g).store_partial(target + i, count);
    }
  }
  for (int64_t half = kVectors / 2; half > 0; half /= 2) {
    for (int64_t v = 0; v < half; ++v) sums[v] = sums[v] + sums[v + half];
  }
  return sums[0].sum();
}

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
      for (int64_t slot = token * params.top_k; slot < (token + 1) * params.top_k; ++slot) {
        const int64_t row = params.slot_rows[slot];
        A& grad_weight = static_cast<A*>(params.grad_topk_weights)[slot];
        if (row < 0) {
          grad_weight = 0;
          continue;
        }
        grad_weight = scale_and_dot<true>(grad_out, static_cast<const A*>(params.topk_weights)[slot],
                                          static_cast<const T*>(params.rows) + row * params.rows_row_stride, size,
                                          static_cast<T*>(params.grad_rows) + row * size);
      }
      const T* hidden_states = static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride;
      A& grad_zero_weight = static_cast<A*>(params.grad_zero_weight)[token];
      if (params.grad_hidden_states != nullptr) {
        grad_zero_weight =
            scale_and_dot<true>(grad_out, static_cast<const A*>(params.zero_weight)[token], hidden_states, size,
                                static_cast<T*>(params.grad_hidden_states) + token * size);
      } else {
        grad_zero_weight = scale_and_dot<false>(grad_out, A(0), hidden_states, size, static_cast<T*>(nullptr));
      }
    }
  });
}
