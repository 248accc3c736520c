// SPDX-License-Identifier: Apache-2.0
// From logits to scores and keys. A part of biased_topk_kernel-inl.h, compiled once per instruction set.
//
// Rows are padded to whole vectors. NaN marks a masked expert from here to the end: sums leave it out and no comparison
// with it holds.

/// x if x is finite, NaN otherwise.
template <typename T>
ZEXPERT_INLINE Vec<T> mask_non_finite(Vec<T> x) {
  return Vec<T>::multiply_add(x, Vec<T>::zero(), x);
}

/// Copies a row of logits, with NaN for masked ones and for the padding. Returns the largest unmasked logit, -inf if
/// all are masked.
template <typename T, typename Logit>
T load_logits(const Logit* row, int64_t num_experts, int64_t padded_experts, T* logits) {
  using V = Vec<T>;
  constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
  // A maximum waits for the one before it: with four at a time the loop runs at the speed of its loads.
  constexpr int64_t kUnroll = 4;
  V largest[kUnroll];
  for (V& lanes : largest) lanes = V::broadcast(-std::numeric_limits<T>::infinity());
  int64_t i = 0;
  for (; i + kUnroll * V::kWidth <= num_experts; i += kUnroll * V::kWidth) {
    for (int64_t j = 0; j < kUnroll; ++j) {
      const V x = mask_non_finite(V::load(row + i + j * V::kWidth));
      x.store(logits + i + j * V::kWidth);
      largest[j] = V::max(x, largest[j]);
    }
  }
  for (; i < num_experts; i += V::kWidth) {
    const int64_t count = std::min(num_experts - i, V::kWidth);
    const V x = mask_non_finite(V::load_partial(row + i, count, kNan));
    x.store(logits + i);
    largest[0] = V::max(x, largest[0]);
  }
  for (; i < padded_experts; i += V::kWidth) V::broadcast(kNan).store(logits + i);
  return V::max(V::max(largest[0], largest[1]), V::max(largest[2], largest[3])).largest();
}

/// Replaces logits by transform(logits, sum) and returns what transform added to its sums. It also prefetches a later
/// row's logits: the arithmetic of this pass hides the latency of memory. They go to the second-level cache, for which
/// processors read ahead by themselves after a sequence of requests.
template <typename T, typename Logit, typename Transform>
ZEXPERT_INLINE T transform_in_place(T* logits, int64_t padded_experts, const Logit* later_row,
                                    const Transform& transform) {
  using V = Vec<T>;
  // Four sums of a quarter of the terms each: rounding errors of a sum grow with the number of its terms.
  V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  static_assert(kBlock % (4 * V::kWidth) == 0, "rows are padded to whole blocks");
  for (int64_t i = 0; i < padded_experts; i += 4 * V::kWidth) {
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t at = i + j * V::kWidth;
      __builtin_prefetch(later_row + at, 0, 2);
      transform(V::load(logits + at), sums[j]).store(logits + at);
    }
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])).sum();
}

/// Fills `scores` and returns their common factor: expert i's score is scores[i] * factor.
template <typename T, typename Logit>
T load_scores(const SharedByRows<T>& shared, const Logit* row, const Logit* later_row, T* scores) {
  using V = Vec<T>;
  const int64_t padded_experts = shared.padded_experts;
  const V largest = V::broadcast(load_logits(row, shared.inputs.spec.num_logits, padded_experts, scores));
  return visit_scoring_func(shared.inputs.spec.scoring_func, [&](auto scoring) -> T {
    using Scoring = decltype(scoring);
    if constexpr (Scoring::kIsSoftmax) {
      const T sum = transform_in_place(scores, padded_experts, later_row, [&](V logits, V& partial_sum) {
        const V term = Scoring::term(logits, largest);
        partial_sum = partial_sum + V::max(term, V::zero());  // a masked expert's NaN counts as 0
        return term;
      });
      return T(1) / sum;
    } else {
      transform_in_place(scores, padded_experts, later_row, [](V logits, V&) { return Scoring::score(logits); });
      return T(1);
    }
  });
}

/// keys = scores * factor + bias.
template <typename T>
void make_keys(const T* scores, T factor, const T* bias, int64_t padded_experts, T* keys) {
  using V = Vec<T>;
  for (int64_t i = 0; i < padded_experts; i += V::kWidth) {
    const V score = unfused(V::load(scores + i) * V::broadcast(factor));
    (score + V::load(bias + i)).store(keys + i);
  }
}
