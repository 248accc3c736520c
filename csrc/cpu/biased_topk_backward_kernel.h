// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by biased_topk_backward.cpp through for_each_isa.h, with the forward's kernel,
// whose choice it makes again.
#include "cpu/biased_topk_kernel.h"

// What a token's few chosen experts need is computed in float64: differences of their gradients lose digits.

/// The upstream gradient of each chosen expert's scaled weight, times the scale.
template <typename T>
void gather_gradients(const BiasedTopKBackwardParams& params, int64_t token, const int32_t* chosen, int64_t count,
                      double* gradients) {
  const RoutingSpec& spec = params.spec;
  const int64_t first_constant = spec.num_real_experts + spec.num_identity_experts;
  const int64_t first_drop = first_constant + spec.num_constant_experts;
  const T* topk = static_cast<const T*>(params.grad_topk_weights) + token * spec.top_k;
  const T zero = static_cast<const T*>(params.grad_zero_weight)[token];
  const T* constant = static_cast<const T*>(params.grad_constant_weight) + token * spec.num_constant_experts;
  for (int64_t k = 0; k < count; ++k) {
    T gradient = 0;
    if (chosen[k] < spec.num_real_experts) {
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
inline void renormalize_backward(const double* weights, int64_t count, double* gradients) {
  double sum = 0;
  double dot = 0;
  for (int64_t k = 0; k < count; ++k) sum += weights[k];
  for (int64_t k = 0; k < count; ++k) dot += gradients[k] * (weights[k] / sum);
  for (int64_t k = 0; k < count; ++k) gradients[k] = sum != 0 ? (gradients[k] - dot) / sum : 0;
}

/// d score / d logit, for all but softmax, whose scores depend on every logit.
inline double score_slope(ScoringFunc scoring_func, double score) {
  if (scoring_func == ScoringFunc::kSigmoid) {
    return score * (1 - score);
  }
  // With score^2 = softplus(x), sigmoid(x) = 1 - exp(-score^2). The slope goes to 0 with the score.
  return score > 0 ? -std::expm1(-score * score) / (2 * score) : 0;
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
  Logit* grad_logits = static_cast<Logit*>(params.grad_logits) + token * spec.num_experts;
  int32_t chosen[kMaxTopK];
  const auto [count, factor] = choose<Logit>(shared, token, workspace, chosen);

  double weights[kMaxTopK];
  double gradients[kMaxTopK];
  const int64_t first_drop = spec.num_experts - spec.num_drop_experts();
  for (int64_t k = 0; k < count; ++k) weights[k] = static_cast<double>(scores[chosen[k]] * factor);
  gather_gradients<T>(params, token, chosen, count, gradients);
  if (spec.renormalize) {
    for (int64_t k = 0; k < count; ++k) {
      weights[k] = spec.drop_before_renormalize && chosen[k] >= first_drop ? 0 : weights[k];
    }
    renormalize_backward(weights, count, gradients);
  }

  if (spec.scoring_func != ScoringFunc::kSoftmax || count == 0) {
    std::fill(grad_logits, grad_logits + spec.num_experts, Logit(0.0F));
    for (int64_t k = 0; k < count; ++k) {
      const double slope = weights[k] > 0 ? score_slope(spec.scoring_func, weights[k]) : 0;
      grad_logits[chosen[k]] = static_cast<Logit>(gradients[k] * slope);
    }
    return;
  }
  // Renormalised weights do not change when all scores are scaled alike: their gradients' dot product is 0.
  double dot = 0;
  for (int64_t k = 0; k < count && !spec.renormalize; ++k) dot += gradients[k] * weights[k];
  spread_softmax(scores, factor, static_cast<T>(dot), spec.num_experts, grad_logits);
  for (int64_t k = 0; k < count; ++k) {
    grad_logits[chosen[k]] = static_cast<Logit>(weights[k] * (gradients[k] - dot));
  }
}

template <typename Logit, typename T>
void biased_topk_backward(const SharedByRows<T>& shared, const BiasedTopKBackwardParams& params) {
  // Below this many logits a range costs less than waking a thread.
  constexpr int64_t kGrainLogits = 32768;
  const int64_t grain = std::max<int64_t>(kGrainLogits / shared.padded_experts, 1);
  parallel_for(0, params.num_tokens, grain, [&](int64_t begin, int64_t end) {
    const Workspace<T> workspace(shared.padded_experts, params.spec.num_expert_group);
    for (int64_t token = begin; token < end; ++token) differentiate_token<Logit>(shared, params, token, workspace);
  });
}
