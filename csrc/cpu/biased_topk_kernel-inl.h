// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by biased_topk.cpp through for_each_isa.h, with the parts below. None of them may
// include anything else.
#include "scoring_functions-inl.h"

#include "cpu/biased_topk_scores-inl.h"
#include "cpu/biased_topk_select-inl.h"

/// The sum of a group's two largest keys, or its only key; -inf if no key can be chosen or the sum is NaN.
template <typename T>
T score_group(const T* keys, int64_t group_size) {
  using V = Vec<T>;
  constexpr T kNan = std::numeric_limits<T>::quiet_NaN();
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  V largest = V::broadcast(-kInfinity);
  V second = V::broadcast(-kInfinity);
  int64_t num_choosable = 0;
  for (int64_t i = 0; i < group_size; i += V::kWidth) {
    const V key = i + V::kWidth <= group_size ? V::load(keys + i) : V::load_partial(keys + i, group_size - i, kNan);
    num_choosable += __builtin_popcount(V::greater_equal(key, key));
    const V key_or_least = V::max(key, V::broadcast(-kInfinity));  // -inf for a NaN
    second = V::max(V::min(key_or_least, largest), second);
    largest = V::max(key_or_least, largest);
  }
  const T first = largest.largest();
  if (num_choosable < 2) {
    return first;
  }
  // Without one lane that holds the largest, the largest of what is left is the second.
  const Mask holds_first = V::greater_equal(largest, V::broadcast(first));
  const V rest = V::select(holds_first & (~holds_first + 1), V::broadcast(-kInfinity), largest);
  const T sum = first + V::max(rest, second).largest();
  return sum == sum ? sum : -kInfinity;
}

/// Makes the keys NaN of all groups but the best topk_group.
template <typename T>
void apply_groups(const RoutingSpec& spec, T* keys, T* group_scores, int32_t* group_order) {
  const int64_t group_size = spec.num_real_experts / spec.num_expert_group;
  for (int64_t group = 0; group < spec.num_expert_group; ++group) {
    group_scores[group] = score_group(keys + group * group_size, group_size);
    group_order[group] = static_cast<int32_t>(group);
  }
  const auto is_better = [group_scores](int32_t a, int32_t b) {
    return group_scores[a] > group_scores[b] || (group_scores[a] == group_scores[b] && a < b);
  };
  std::nth_element(group_order, group_order + spec.topk_group, group_order + spec.num_expert_group, is_better);
  for (int64_t i = spec.topk_group; i < spec.num_expert_group; ++i) {
    T* group_keys = keys + group_order[i] * group_size;
    std::fill(group_keys, group_keys + group_size, std::numeric_limits<T>::quiet_NaN());
  }
}

/// Writes a token's experts into `chosen` [top_k] in slot order, -1 for a slot that stays empty. Returns the scores'
/// common factor: expert i's score is workspace.scores[i] * factor.
template <typename Logit, typename T>
ZEXPERT_INLINE T choose(const SharedByRows<T>& shared, int64_t token, const Workspace<T>& workspace, int32_t* chosen) {
  const RoutingInputs& inputs = shared.inputs;
  const RoutingSpec& spec = inputs.spec;
  T* scores = workspace.scores.get();
  T* keys = workspace.keys.get();
  const auto* logits = static_cast<const Logit*>(inputs.logits);
  const Logit* row = logits + token * inputs.row_stride();
  // Two rows ahead: a row is routed faster than memory answers.
  const Logit* later_row = logits + std::min(token + 2, inputs.num_tokens - 1) * inputs.row_stride();

  const T factor = load_scores(shared, row, later_row, scores);
  if (inputs.choices != nullptr) {
    const int32_t* given = inputs.choices + token * spec.top_k;
    for (int64_t k = 0; k < spec.top_k; ++k) {
      const bool is_masked = given[k] >= 0 && scores[given[k]] != scores[given[k]];
      chosen[k] = is_masked ? -1 : given[k];
    }
    return factor;
  }
  make_keys(scores, factor, shared.bias, shared.padded_experts, keys);
  if (spec.topk_group < spec.num_expert_group) {
    apply_groups(spec, keys, workspace.group_scores.get(), workspace.group_order.get());
  }
  const int64_t count = select_top_k(keys, shared.padded_experts, spec.top_k, workspace.candidates.get(), chosen);
  std::fill(chosen + count, chosen + spec.top_k, -1);
  return factor;
}

/// Divides the weights by their sum, added up in slot order; with a sum of 0 all weights are 0.
template <typename T>
void renormalize(T* weights, int64_t top_k) {
  T sum = 0;
  for (int64_t k = 0; k < top_k; ++k) sum += weights[k];
  for (int64_t k = 0; k < top_k; ++k) weights[k] = sum != 0 ? weights[k] / sum : T(0);
}

/// The weights of the chosen experts, 0 for empty slots, before the scaling factor.
template <typename T>
void weigh(const RoutingSpec& spec, const T* scores, T factor, const int32_t* chosen, T* weights) {
  const int64_t first_drop = spec.num_logits - spec.num_drop_experts();
  for (int64_t k = 0; k < spec.top_k; ++k) {
    const bool is_dropped = spec.drop_before_renormalize && chosen[k] >= first_drop;
    weights[k] = chosen[k] < 0 || is_dropped ? T(0) : scores[chosen[k]] * factor;
  }
  if (spec.renormalize) {
    renormalize(weights, spec.top_k);
  }
}

/// Writes a token's results: each slot's weight goes to the output for its expert's kind.
template <typename T, typename Id>
void write_weights(const BiasedTopKParams& params, int64_t token, const int32_t* chosen, const T* weights) {
  const RoutingSpec& spec = params.spec;
  const int64_t first_constant = spec.num_real_experts + spec.num_identity_experts;
  const auto scale = static_cast<T>(spec.routed_scaling_factor);
  T* topk_weights = static_cast<T*>(params.topk_weights) + token * spec.top_k;
  Id* topk_ids = static_cast<Id*>(params.topk_ids) + token * spec.top_k;
  T zero_weight = 0;
  for (int64_t k = 0; k < spec.top_k; ++k) {
    const bool is_real = chosen[k] >= 0 && chosen[k] < spec.num_real_experts;
    const bool is_identity = chosen[k] >= spec.num_real_experts && chosen[k] < first_constant;
    topk_weights[k] = is_real ? weights[k] * scale : T(0);
    topk_ids[k] = is_real ? static_cast<Id>(chosen[k]) : Id(-1);
    zero_weight += is_identity ? weights[k] : T(0);
  }
  static_cast<T*>(params.zero_weight)[token] = zero_weight * scale;

  if (spec.num_constant_experts > 0) {
    T* constant_weight = static_cast<T*>(params.constant_weight) + token * spec.num_constant_experts;
    std::fill(constant_weight, constant_weight + spec.num_constant_experts, T(0));
    for (int64_t k = 0; k < spec.top_k; ++k) {
      const int64_t constant = chosen[k] - first_constant;
      if (constant >= 0 && constant < spec.num_constant_experts) {
        constant_weight[constant] = weights[k] * scale;
      }
    }
  }
}

template <typename Logit, typename T>
void route_token(const SharedByRows<T>& shared, const BiasedTopKParams& params, int64_t token,
                 const Workspace<T>& workspace) {
  int32_t chosen[kMaxTopK];
  T weights[kMaxTopK];
  const T factor = choose<Logit>(shared, token, workspace, chosen);
  weigh(params.spec, workspace.scores.get(), factor, chosen, weights);
  if (params.ids_type == ScalarType::kInt64) {
    write_weights<T, int64_t>(params, token, chosen, weights);
  } else {
    write_weights<T, int32_t>(params, token, chosen, weights);
  }
}

/// Calls fn(token, workspace) for every token. Each thread has its own workspace.
template <typename T, typename Fn>
void for_each_token(const SharedByRows<T>& shared, const Fn& fn) {
  // Below this many logits a range costs less than waking a thread.
  constexpr int64_t kGrainLogits = 32768;
  const int64_t grain = std::max<int64_t>(kGrainLogits / shared.padded_experts, 1);
  parallel_for(0, shared.inputs.num_tokens, grain, [&](int64_t begin, int64_t end) {
    const Workspace<T> workspace(shared.padded_experts, shared.inputs.spec.num_expert_group);
    for (int64_t token = begin; token < end; ++token) fn(token, workspace);
  });
}

template <typename Logit, typename T>
void biased_topk(const SharedByRows<T>& shared, const BiasedTopKParams& params) {
  for_each_token(shared, [&](int64_t token, const Workspace<T>& workspace) {
    route_token<Logit>(shared, params, token, workspace);
  });
}

template <typename Logit, typename T>
void biased_topk_choices(const SharedByRows<T>& shared, const BiasedTopKChoicesParams& params) {
  for_each_token(shared, [&](int64_t token, const Workspace<T>& workspace) {
    choose<Logit>(shared, token, workspace, params.chosen + token * params.spec.top_k);
  });
}

// Backward. The numbers of a token's few chosen experts are computed in float64: differences of their gradients lose
// digits.

/// The upstream gradient of each chosen expert's scaled weight, times the scale; 0 for empty slots.
template <typename T>
void gather_gradients(const BiasedTopKBackwardParams& params, int64_t token, const int32_t* chosen, double* gradients) {
  const RoutingSpec& spec = params.spec;
  const int64_t first_constant = spec.num_real_experts + spec.num_identity_experts;
  const int64_t first_drop = first_constant + spec.num_constant_experts;
  const T* topk = static_cast<const T*>(params.grad_topk_weights) + token * spec.top_k;
  const T zero = static_cast<const T*>(params.grad_zero_weight)[token];
  const T* constant = static_cast<const T*>(params.grad_constant_weight) + token * spec.num_constant_experts;
  for (int64_t k = 0; k < spec.top_k; ++k) {
    T gradient = 0;
    if (chosen[k] < 0) {
      gradient = 0;
    } else if (chosen[k] < spec.num_real_experts) {
      gradient = topk[k];
    } else if (chosen[k] < first_constant) {
      gradient = zero;
    } else if (chosen[k] < first_drop) {
      gradient = constant[chosen[k] - first_constant];
    }
    gradients[k] = static_cast<double>(gradient) * spec.routed_scaling_factor;
  }
}

/// Turns the gradients of renormalised weights into those of the weights before, in place.
inline void renormalize_backward(const double* weights, int64_t top_k, double* gradients) {
  double sum = 0;
  double dot = 0;
  for (int64_t k = 0; k < top_k; ++k) sum += weights[k];
  for (int64_t k = 0; k < top_k; ++k) dot += gradients[k] * (weights[k] / sum);
  for (int64_t k = 0; k < top_k; ++k) gradients[k] = sum != 0 ? (gradients[k] - dot) / sum : 0;
}

/// row = -dot * score for every expert, 0 for masked ones.
template <typename T, typename Logit>
void spread_softmax(const T* scores, T factor, T dot, int64_t num_experts, Logit* row) {
  using V = Vec<T>;
  const V scale = V::broadcast(-dot * factor);
  for (int64_t i = 0; i < num_experts; i += V::kWidth) {
    const V score = V::load(scores + i);
    const V gradient = V::select(V::greater_equal(score, score), scale * score, V::zero());
    if (i + V::kWidth <= num_experts) {
      gradient.store(row + i);
    } else {
      gradient.store_partial(row + i, num_experts - i);
    }
  }
}

template <typename Logit, typename T>
void differentiate_token(const SharedByRows<T>& shared, const BiasedTopKBackwardParams& params, int64_t token,
                         const Workspace<T>& workspace) {
  const RoutingSpec& spec = params.spec;
  const T* scores = workspace.scores.get();
  Logit* grad_logits = static_cast<Logit*>(params.grad_logits) + token * spec.num_logits;
  int32_t chosen[kMaxTopK];
  const T factor = choose<Logit>(shared, token, workspace, chosen);
  const int64_t top_k = spec.top_k;

  double weights[kMaxTopK];
  double gradients[kMaxTopK];
  const int64_t first_drop = spec.num_logits - spec.num_drop_experts();
  for (int64_t k = 0; k < top_k; ++k) {
    weights[k] = chosen[k] < 0 ? 0 : static_cast<double>(scores[chosen[k]] * factor);
  }
  gather_gradients<T>(params, token, chosen, gradients);
  if (spec.renormalize) {
    for (int64_t k = 0; k < top_k; ++k) {
      weights[k] = spec.drop_before_renormalize && chosen[k] >= first_drop ? 0 : weights[k];
    }
    renormalize_backward(weights, top_k, gradients);
  }

  visit_scoring_func(spec.scoring_func, [&](auto scoring) {
    using Scoring = decltype(scoring);
    if constexpr (Scoring::kIsSoftmax) {
      // Renormalised weights do not change when all scores are scaled alike: their gradients' dot product is 0.
      double dot = 0;
      for (int64_t k = 0; k < top_k && !spec.renormalize; ++k) dot += gradients[k] * weights[k];
      if (dot != 0) {
        spread_softmax(scores, factor, static_cast<T>(dot), spec.num_logits, grad_logits);
      } else {
        std::fill(grad_logits, grad_logits + spec.num_logits, Logit(0.0F));
      }
      for (int64_t k = 0; k < top_k; ++k) {
        if (chosen[k] >= 0) {
          grad_logits[chosen[k]] = static_cast<Logit>(weights[k] * (gradients[k] - dot));
        }
      }
    } else {
      std::fill(grad_logits, grad_logits + spec.num_logits, Logit(0.0F));
      for (int64_t k = 0; k < top_k; ++k) {
        if (chosen[k] >= 0) {
          const double slope = weights[k] > 0 ? Scoring::slope(weights[k]) : 0;
          grad_logits[chosen[k]] = static_cast<Logit>(gradients[k] * slope);
        }
      }
    }
  });
}

template <typename Logit, typename T>
void biased_topk_backward(const SharedByRows<T>& shared, const BiasedTopKBackwardParams& params) {
  for_each_token(shared, [&](int64_t token, const Workspace<T>& workspace) {
    differentiate_token<Logit>(shared, params, token, workspace);
  });
}
