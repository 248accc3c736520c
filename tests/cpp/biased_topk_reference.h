// SPDX-License-Identifier: Apache-2.0
// A scalar loop in double precision that says what biased_topk must give, and calls that are held against it.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "zexpert/biased_topk.h"

namespace zexpert {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();
inline constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// ---- Typed memory ---------------------------------------------------------------------------------------------------

inline size_t element_size(ScalarType type) {
  if (type == ScalarType::kInt32 || type == ScalarType::kInt64) {
    return type == ScalarType::kInt32 ? 4 : 8;
  }
  size_t size = 0;
  visit_floating(type, [&](auto element) { size = sizeof(element); });
  return size;
}

inline void store(void* base, ScalarType type, int64_t index, double value) {
  visit_floating(type, [&](auto element) {
    element = static_cast<decltype(element)>(value);
    std::memcpy(static_cast<char*>(base) + index * static_cast<int64_t>(sizeof(element)), &element, sizeof(element));
  });
}

inline double load(const void* base, ScalarType type, int64_t index) {
  double value = 0;
  visit_floating(type, [&](auto element) {
    std::memcpy(&element, static_cast<const char*>(base) + index * static_cast<int64_t>(sizeof(element)),
                sizeof(element));
    value = static_cast<double>(element);
  });
  return value;
}

/// `value` after a trip through `type`.
inline double rounded(double value, ScalarType type) {
  double memory = 0;
  store(&memory, type, 0, value);
  return load(&memory, type, 0);
}

/// An array that ends where its memory ends and starts `offset` elements into it, off every vector's boundary.
struct Array {
  Array(ScalarType element_type, int64_t size, int64_t elements_before)
      : type(element_type),
        offset(elements_before),
        bytes(static_cast<size_t>(size + elements_before) * element_size(element_type), char{0x5a}) {}
  void* data() { return bytes.data() + static_cast<size_t>(offset) * element_size(type); }
  const void* data() const { return bytes.data() + static_cast<size_t>(offset) * element_size(type); }
  double operator[](int64_t index) const { return load(data(), type, index); }
  int64_t id(int64_t index) const {
    const char* source = static_cast<const char*>(data()) + static_cast<size_t>(index) * element_size(type);
    int32_t narrow = 0;
    int64_t wide = 0;
    std::memcpy(&narrow, source, sizeof(narrow));
    std::memcpy(&wide, source, type == ScalarType::kInt64 ? sizeof(wide) : 0);
    return type == ScalarType::kInt64 ? wide : narrow;
  }

  ScalarType type;
  int64_t offset;
  std::vector<char> bytes;
};

// ---- The reference --------------------------------------------------------------------------------------------------

using Row = std::vector<double>;

struct Reference {
  std::vector<int64_t> chosen;  // best first, zero experts included
  std::vector<int64_t> topk_ids;
  Row topk_weights;
  double zero_weight = 0;
  Row constant_weight;
  bool is_clear_cut = true;  // no two keys, or groups, so close that rounding could swap them
};

inline double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

inline Row reference_scores(const Row& logits, ScoringFunc scoring_func) {
  Row scores(logits.size(), kNan);
  double largest = -kInfinity;
  double sum = 0;
  for (double x : logits) largest = std::isfinite(x) ? std::max(largest, x) : largest;
  for (double x : logits) sum += std::isfinite(x) ? std::exp(x - largest) : 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isfinite(logits[i])) {
      switch (scoring_func) {
        case ScoringFunc::kSoftmax: scores[i] = std::exp(logits[i] - largest) / sum; break;
        case ScoringFunc::kSigmoid: scores[i] = 1 / (1 + std::exp(-logits[i])); break;
        case ScoringFunc::kSqrtSoftplus: scores[i] = std::sqrt(softplus(logits[i])); break;
      }
    }
  }
  return scores;
}

inline bool are_close(double a, double b) {
  return a != b && std::abs(a - b) <= 4e-6 * std::max(std::abs(a), std::abs(b));
}

/// Positions of `values` without NaN, largest first, ties in order.
inline std::vector<int64_t> descending_order(const Row& values) {
  std::vector<int64_t> order;
  for (size_t i = 0; i < values.size(); ++i) {
    if (!std::isnan(values[i])) {
      order.push_back(static_cast<int64_t>(i));
    }
  }
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)];
  });
  return order;
}

/// True where the first `count` of an order would not change if values moved by a rounding error.
inline bool is_order_clear_cut(const Row& values, const std::vector<int64_t>& order, int64_t count) {
  for (size_t i = 1; i < order.size() && i <= static_cast<size_t>(count); ++i) {
    if (are_close(values[static_cast<size_t>(order[i - 1])], values[static_cast<size_t>(order[i])])) {
      return false;
    }
  }
  return true;
}

inline bool keep_best_groups(const RoutingSpec& spec, Row& keys) {
  Row group_scores;
  const int64_t size = spec.num_real_experts / spec.num_expert_group;
  for (int64_t group = 0; group < spec.num_expert_group; ++group) {
    const Row members(keys.begin() + group * size, keys.begin() + (group + 1) * size);
    const std::vector<int64_t> order = descending_order(members);
    double score = order.empty() ? -kInfinity : 0;
    for (size_t i = 0; i < std::min<size_t>(order.size(), 2); ++i) score += members[static_cast<size_t>(order[i])];
    group_scores.push_back(std::isnan(score) ? -kInfinity : score);
  }
  const std::vector<int64_t> order = descending_order(group_scores);
  for (size_t i = static_cast<size_t>(spec.topk_group); i < order.size(); ++i) {
    std::fill(keys.begin() + order[i] * size, keys.begin() + (order[i] + 1) * size, kNan);
  }
  return is_order_clear_cut(group_scores, order, spec.topk_group);
}

inline Reference route(const RoutingSpec& spec, const Row& logits, const Row& bias) {
  Reference result;
  const Row scores = reference_scores(logits, spec.scoring_func);
  Row keys = scores;
  for (size_t i = 0; i < bias.size(); ++i) keys[i] += bias[i];
  if (spec.num_expert_group > 1) {
    result.is_clear_cut = keep_best_groups(spec, keys);
  }
  result.chosen = descending_order(keys);
  result.is_clear_cut = result.is_clear_cut && is_order_clear_cut(keys, result.chosen, spec.top_k);
  result.chosen.resize(std::min(result.chosen.size(), static_cast<size_t>(spec.top_k)));

  const int64_t first_constant = spec.num_real_experts + spec.num_identity_experts;
  const int64_t first_drop = first_constant + spec.num_constant_experts;
  Row weights;
  for (int64_t expert : result.chosen) {
    const bool is_dropped = spec.drop_before_renormalize && expert >= first_drop;
    weights.push_back(is_dropped ? 0 : scores[static_cast<size_t>(expert)]);
  }
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  for (double& weight : weights) {
    weight = (spec.renormalize ? (sum != 0 ? weight / sum : 0) : weight) * spec.routed_scaling_factor;
  }
  result.topk_ids.assign(static_cast<size_t>(spec.top_k), -1);
  result.topk_weights.assign(static_cast<size_t>(spec.top_k), 0);
  result.constant_weight.assign(static_cast<size_t>(spec.num_constant_experts), 0);
  for (size_t k = 0; k < result.chosen.size(); ++k) {
    const int64_t expert = result.chosen[k];
    if (expert < spec.num_real_experts) {
      result.topk_ids[k] = expert;
      result.topk_weights[k] = weights[k];
    } else if (expert < first_constant) {
      result.zero_weight += weights[k];
    } else if (expert < first_drop) {
      result.constant_weight[static_cast<size_t>(expert - first_constant)] = weights[k];
    }
  }
  return result;
}

// ---- A call and its check -------------------------------------------------------------------------------------------

struct Call {
  RoutingSpec spec;
  ScalarType logits_type = ScalarType::kFloat32;
  ScalarType bias_type = ScalarType::kFloat32;
  ScalarType ids_type = ScalarType::kInt32;
  std::vector<Row> logits;  // values that logits_type holds exactly
  std::optional<Row> bias;  // the same for bias_type
  int64_t row_padding = 0;  // row stride less the row's length
  int64_t offset = 0;       // of every array, in elements
};

struct Result {
  Array topk_weights, topk_ids, zero_weight, constant_weight;
};

inline void expect_same_bits(const Result& a, const Result& b);

inline Result run(const Call& call) {
  const auto tokens = static_cast<int64_t>(call.logits.size());
  const RoutingSpec& spec = call.spec;
  const int64_t stride = spec.num_logits + call.row_padding;
  Array logits(call.logits_type, tokens * stride, call.offset);
  Array bias(call.bias_type, spec.num_logits, call.offset);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t i = 0; i < spec.num_logits; ++i) {
      store(logits.data(), logits.type, t * stride + i, call.logits[static_cast<size_t>(t)][static_cast<size_t>(i)]);
    }
  }
  for (int64_t i = 0; call.bias && i < spec.num_logits; ++i) {
    store(bias.data(), bias.type, i, (*call.bias)[static_cast<size_t>(i)]);
  }
  const ScalarType weight_type = call.logits_type == ScalarType::kFloat64 ? ScalarType::kFloat64 : ScalarType::kFloat32;
  Result result{Array(weight_type, tokens * spec.top_k, call.offset),
                Array(call.ids_type, tokens * spec.top_k, call.offset), Array(weight_type, tokens, call.offset),
                Array(weight_type, tokens * spec.num_constant_experts, call.offset)};
  BiasedTopKParams params;
  params.logits = logits.data();
  params.logits_type = call.logits_type;
  params.logits_row_stride = stride;
  params.bias = call.bias ? bias.data() : nullptr;
  params.bias_type = call.bias_type;
  params.topk_weights = result.topk_weights.data();
  params.topk_ids = result.topk_ids.data();
  params.ids_type = call.ids_type;
  params.zero_weight = result.zero_weight.data();
  params.constant_weight = result.constant_weight.data();
  params.num_tokens = tokens;
  params.spec = spec;
  biased_topk_cpu(params);

  // The same choice, made apart and given.
  std::vector<int32_t> choices(static_cast<size_t>(tokens * spec.top_k));
  BiasedTopKChoicesParams choice;
  static_cast<RoutingInputs&>(choice) = params;
  choice.chosen = choices.data();
  biased_topk_choices_cpu(choice);
  Result again{Array(weight_type, tokens * spec.top_k, call.offset),
               Array(call.ids_type, tokens * spec.top_k, call.offset), Array(weight_type, tokens, call.offset),
               Array(weight_type, tokens * spec.num_constant_experts, call.offset)};
  params.choices = choices.data();
  params.topk_weights = again.topk_weights.data();
  params.topk_ids = again.topk_ids.data();
  params.zero_weight = again.zero_weight.data();
  params.constant_weight = again.constant_weight.data();
  biased_topk_cpu(params);
  expect_same_bits(again, result);
  return result;
}

inline std::string describe(const Call& call) {
  const RoutingSpec& spec = call.spec;
  return std::string(name(call.logits_type)) + " logits [" + std::to_string(call.logits.size()) + ", " +
         std::to_string(spec.num_logits) + "], top_k " + std::to_string(spec.top_k) + ", " + name(spec.scoring_func) +
         (call.bias ? std::string(", bias ") + name(call.bias_type) : std::string(", no bias")) + ", ids " +
         name(call.ids_type) + ", groups " + std::to_string(spec.num_expert_group);
}

inline Result expect_matches_reference(const Call& call) {
  SCOPED_TRACE(describe(call));
  const Result result = run(call);
  const RoutingSpec& spec = call.spec;
  const double epsilon = result.topk_weights.type == ScalarType::kFloat64 ? std::numeric_limits<double>::epsilon()
                                                                          : std::numeric_limits<float>::epsilon();
  const auto near = [&](double expected) { return 48 * epsilon * std::abs(expected) + 1e-37; };
  for (size_t t = 0; t < call.logits.size(); ++t) {
    const Reference expected = route(spec, call.logits[t], call.bias.value_or(Row{}));
    const auto token = static_cast<int64_t>(t);
    for (int64_t k = 0; k < spec.top_k; ++k) {
      const int64_t slot = token * spec.top_k + k;
      EXPECT_EQ(result.topk_ids.id(slot), expected.topk_ids[static_cast<size_t>(k)]) << "token " << t << " slot " << k;
      const double weight = expected.topk_weights[static_cast<size_t>(k)];
      EXPECT_NEAR(result.topk_weights[slot], weight, near(weight)) << "token " << t << " slot " << k;
    }
    EXPECT_NEAR(result.zero_weight[token], expected.zero_weight, near(expected.zero_weight)) << "token " << t;
    for (int64_t c = 0; c < spec.num_constant_experts; ++c) {
      const double weight = expected.constant_weight[static_cast<size_t>(c)];
      EXPECT_NEAR(result.constant_weight[token * spec.num_constant_experts + c], weight, near(weight))
          << "token " << t << " constant expert " << c;
    }
    if (::testing::Test::HasFailure()) {
      break;
    }
  }
  return result;
}

inline void expect_same_bits(const Result& a, const Result& b) {
  const auto same = [](const Array& x, const Array& y) {
    const auto size = static_cast<size_t>(x.offset) * element_size(x.type);
    const auto other = static_cast<size_t>(y.offset) * element_size(y.type);
    return std::equal(x.bytes.begin() + static_cast<int64_t>(size), x.bytes.end(),
                      y.bytes.begin() + static_cast<int64_t>(other), y.bytes.end());
  };
  EXPECT_TRUE(same(a.topk_weights, b.topk_weights));
  EXPECT_TRUE(same(a.topk_ids, b.topk_ids));
  EXPECT_TRUE(same(a.zero_weight, b.zero_weight));
  EXPECT_TRUE(same(a.constant_weight, b.constant_weight));
}

inline RoutingSpec make_spec(int64_t width, int64_t top_k) {
  RoutingSpec spec;
  spec.num_real_experts = width;
  spec.top_k = std::min(top_k, width);
  return spec.for_width(width);
}

}  // namespace zexpert
