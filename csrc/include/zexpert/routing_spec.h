// SPDX-License-Identifier: Apache-2.0
// RoutingSpec: the validated description of a routing. Routers hold it, biased_topk computes it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "zexpert/enums.h"
#include "zexpert/error.h"

namespace zexpert {

/// Largest number of experts a token can choose.
inline constexpr int64_t kMaxTopK = 64;

/// Largest number of experts that CUDA routes and plans.
inline constexpr int64_t kMaxExpertsOnCuda = 8192;

/// A count that follows from the width of the logits.
inline constexpr int64_t kFromLogits = -1;

/// How tokens choose among experts ordered [real R | identity I | constant C | drop D], N = R + I + C + D.
///
/// Two counts may be kFromLogits: `num_logits` (N), and `num_identity_experts` (I = N - R - C, no drop experts). An
/// expert that is not real, identity or constant is a drop expert.
struct RoutingSpec {
  int64_t top_k = 1;             ///< K, experts per token, zero experts included
  int64_t num_real_experts = 1;  ///< R
  union {
    int64_t num_logits = kFromLogits;  ///< N, the width of the logits
    int64_t num_experts;               ///< the older name, for one release
  };
  int64_t num_identity_experts = kFromLogits;        ///< I
  int64_t num_constant_experts = 0;                  ///< C
  ScoringFunc scoring_func = ScoringFunc::kSoftmax;  ///< from logits to scores; softmax runs over all N
  bool renormalize = false;                          ///< divide a token's K weights by their sum
  bool drop_before_renormalize = false;              ///< before that, weights of drop experts, D > 0, become 0 (MoE++)
  double routed_scaling_factor = 1.0;                ///< factor on every weight, zero experts' included
  int64_t num_expert_group = 1;                      ///< groups of equal size that the real experts form
  int64_t topk_group = 1;                            ///< groups whose experts a token may choose

  /// Throws Error, naming the field, unless every field is in range and the fields agree with each other.
  void validate() const {
    ZEXPERT_CHECK(num_real_experts >= 1, "num_real_experts must be at least 1, got ", num_real_experts);
    ZEXPERT_CHECK(num_identity_experts >= kFromLogits, "num_identity_experts must not be negative, got ",
                  num_identity_experts);
    ZEXPERT_CHECK(num_constant_experts >= 0, "num_constant_experts must not be negative, got ", num_constant_experts);
    check_scoring_func(scoring_func);
    ZEXPERT_CHECK(top_k >= 1 && top_k <= kMaxTopK, "top_k must be between 1 and ", kMaxTopK, ", got ", top_k);
    ZEXPERT_CHECK(std::abs(routed_scaling_factor) <= std::numeric_limits<float>::max(),
                  "routed_scaling_factor must be finite, got ", routed_scaling_factor);
    ZEXPERT_CHECK(num_expert_group >= 1 && num_real_experts % num_expert_group == 0,
                  "num_expert_group must divide the number of real experts (", num_real_experts, "), got ",
                  num_expert_group);
    ZEXPERT_CHECK(topk_group >= 1 && topk_group <= num_expert_group,
                  "topk_group must be between 1 and num_expert_group (", num_expert_group, "), got ", topk_group);
    ZEXPERT_CHECK(renormalize || !drop_before_renormalize, "drop_before_renormalize needs renormalize, got false");
    ZEXPERT_CHECK(num_identity_experts != kFromLogits || !drop_before_renormalize,
                  "drop_before_renormalize needs drop experts, got none: num_identity_experts must be given");
    if (num_logits != kFromLogits) {
      const int64_t identity = num_identity_experts == kFromLogits ? 0 : num_identity_experts;
      const auto plus = [](int64_t a, int64_t b) {  // the counts may be huge: the sum stops at the largest number
        constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
        return a > kMost - b ? kMost : a + b;
      };
      const int64_t counted = plus(plus(num_real_experts, identity), num_constant_experts);
      ZEXPERT_CHECK(num_logits >= counted, "num_logits (the width of the logits) must be at least ", counted,
                    ", the real, identity and constant experts together, got ", num_logits);
      ZEXPERT_CHECK(top_k <= num_logits, "top_k must be at most the number of experts (", num_logits, "), got ", top_k);
      ZEXPERT_CHECK(num_logits > counted || !drop_before_renormalize,
                    "drop_before_renormalize needs drop experts, got none of ", num_logits, " experts");
    }
  }

  /// This spec for logits `width` wide: every count known. Throws Error if the width does not fit.
  RoutingSpec for_width(int64_t width) const {
    ZEXPERT_CHECK(width >= 0, "width must not be negative, got ", width);
    ZEXPERT_CHECK(num_logits == kFromLogits || num_logits == width, "logits must have ", num_logits,
                  " columns, one per expert, got ", width);
    RoutingSpec resolved = *this;
    resolved.num_logits = width;
    resolved.validate();
    if (num_identity_experts == kFromLogits) {
      resolved.num_identity_experts = width - num_real_experts - num_constant_experts;
    }
    return resolved;
  }

  /// Drop experts D. Every count must be known.
  int64_t num_drop_experts() const {
    return num_logits - num_real_experts - num_identity_experts - num_constant_experts;
  }

  bool operator==(const RoutingSpec& other) const {
    return top_k == other.top_k && num_real_experts == other.num_real_experts && num_logits == other.num_logits &&
           num_identity_experts == other.num_identity_experts && num_constant_experts == other.num_constant_experts &&
           scoring_func == other.scoring_func && renormalize == other.renormalize &&
           drop_before_renormalize == other.drop_before_renormalize &&
           routed_scaling_factor == other.routed_scaling_factor && num_expert_group == other.num_expert_group &&
           topk_group == other.topk_group;
  }
};

}  // namespace zexpert
