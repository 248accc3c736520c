// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by zero_expert_accumulate.cpp through for_each_isa.h.

template <bool kAccumulate, typename T>
ZEXPERT_INLINE void scale_row(const T* source, accumulate_t<T> weight, T* target, int64_t size) {
  using V = Vec<accumulate_t<T>>;
  const V scale = V::broadcast(weight);
  int64_t i = 0;
  for (; i + V::kWidth <= size; i += V::kWidth) {
    V value = scale * V::load(source + i);
    if constexpr (kAccumulate) {
      value = V::multiply_add(scale, V::load(source + i), V::load(target + i));
    }
    value.store(target + i);
  }
  if (i < size) {
    V value = scale * V::load_partial(source + i, size - i, 0);
    if constexpr (kAccumulate) {
      value =
          V::multiply_add(scale, V::load_partial(source + i, size - i, 0), V::load_partial(target + i, size - i, 0));
    }
    value.store_partial(target + i, size - i);
  }
}

template <typename T>
void zero_expert_accumulate(const ZeroExpertAccumulateParams& params) {
  // Below this many elements a range costs less than waking a thread.
  constexpr int64_t kGrainElements = 32768;
  const auto* hidden_states = static_cast<const T*>(params.hidden_states);
  const auto* zero_weight = static_cast<const accumulate_t<T>*>(params.zero_weight);
  auto* out = static_cast<T*>(params.out);
  const int64_t grain_size = std::max<int64_t>(kGrainElements / params.hidden_size, 1);
  parallel_for(0, params.num_tokens, grain_size, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const T* source = hidden_states + token * params.hidden_row_stride;
      T* target = out + token * params.out_row_stride;
      if (params.accumulate) {
        scale_row<true>(source, zero_weight[token], target, params.hidden_size);
      } else {
        scale_row<false>(source, zero_weight[token], target, params.hidden_size);
      }
    }
  });
}
