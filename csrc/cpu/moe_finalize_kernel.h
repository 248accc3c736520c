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
  const int32_t* slot_rows = params.slot_rows + token * params.top_k;
  const A* topk_weights = static_cast<const A*>(params.topk_weights) + token * params.top_k;
  for (int64_t k = 0; k < params.top_k; ++k) {
    if (slot_rows[k] >= 0) {
      addends[count++] = {static_cast<const T*>(params.rows) + slot_rows[k] * params.rows_row_stride, topk_weights[k]};
    }
  }
  addends[count++] = {static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride,
                      static_cast<const A*>(params.zero_weight)[token]};
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
                  out + token * params.hidden_size);
    }
  });
}
