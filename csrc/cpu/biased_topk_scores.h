// From logits to scores. A part of biased_topk_kernel.h, compiled once per instruction set.
//
// Rows are padded to whole vectors. NaN marks a masked expert from here to the end: sums pass over it and no comparison
// with it holds.

/// x for a finite x, NaN for every other.
template <typename T>
ZEXPERT_INLINE Vec<T> mask_non_finite(Vec<T> x) {
  return Vec<T>::multiply_add(x, Vec<T>::zero(), x);
}

/// Copies a row of logits, NaN in place of masked ones and of those up to padded_experts. Returns the largest unmasked
/// logit, -inf where there is none.
template <typename T, typename Logit>
T load_logits(const Logit* row, int64_t num_experts, int64_t padded_experts, T* logits) {
  using V = Vec<T>;
  constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
  // A maximum waits for the one before it: four at a time keep the loop at the speed of its loads.
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

/// Turns logits into exp(logit - largest) and returns the factor, 1 / sum, that makes them a softmax.
template <typename T>
T softmax_in_place(T* logits, int64_t padded_experts, T largest, const T* logits_next) {
  using V = Vec<T>;
  V sum = V::zero();
  for (int64_t i = 0; i < padded_experts; i += V::kWidth) {
    __builtin_prefetch(logits_next + i);
    const V e = exp_up_to_130(V::load(logits + i) - V::broadcast(largest));
    e.store(logits + i);
    sum = sum + V::max(e, V::zero());  // a masked expert's NaN counts as 0
  }
  return T(1) / sum.sum();
}

template <typename T>
void sigmoid_in_place(T* logits, int64_t padded_experts) {
  using V = Vec<T>;
  for (int64_t i = 0; i < padded_experts; i += V::kWidth) sigmoid(V::load(logits + i)).store(logits + i);
}

template <typename T>
void sqrt_softplus_in_place(T* logits, int64_t padded_experts) {
  using V = Vec<T>;
  for (int64_t i = 0; i < padded_experts; i += V::kWidth) V::sqrt(softplus(V::load(logits + i))).store(logits + i);
}

/// Fills `scores` and returns their common factor: expert i's score is scores[i] * factor.
template <typename T, typename Logit>
T load_scores(const Logit* row, const SharedByRows<T>& shared, T* scores) {
  const RoutingSpec& spec = shared.params.spec;
  const T largest = load_logits(row, spec.num_experts, shared.padded_experts, scores);
  switch (spec.scoring_func) {
    case ScoringFunc::kSoftmax: return softmax_in_place(scores, shared.padded_experts, largest, (const T*)(row + 768));
    case ScoringFunc::kSigmoid: sigmoid_in_place(scores, shared.padded_experts); break;
    case ScoringFunc::kSqrtSoftplus: sqrt_softplus_in_place(scores, shared.padded_experts); break;
  }
  return T(1);
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
