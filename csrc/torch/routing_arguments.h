// SPDX-License-Identifier: Apache-2.0
// The arguments of an operator that say how to route: their schema, and how they become a RoutingSpec. An argument that
// is added here and in RoutingSpec is an argument of biased_topk, its relatives and route.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include "torch/box.h"
#include "torch/tensor.h"
#include "zexpert/error.h"
#include "zexpert/routing_spec.h"

/// As schemas spell them, in the order in which ReadArgument<RoutingArguments> reads them.
#define ZEXPERT_ROUTING_ARGUMENTS "int top_k, *, " ZEXPERT_ROUTING_KEYWORDS

/// The same with given choices, in the order in which ReadArgument<RoutingWithChoices> reads them. PyTorch does not
/// differentiate operators with keyword-only tensors.
#define ZEXPERT_ROUTING_ARGUMENTS_WITH_CHOICES "int top_k, Tensor? choices=None, *, " ZEXPERT_ROUTING_KEYWORDS

#define ZEXPERT_ROUTING_KEYWORDS                                                               \
  "int num_real_experts, int? num_identity_experts=None, int num_constant_experts=0, "         \
  "str scoring_func=\"softmax\", bool renormalize=False, bool drop_before_renormalize=False, " \
  "float routed_scaling_factor=1.0, int num_expert_group=1, int topk_group=1"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

class RoutingArguments {
 public:
  /// The spec that they describe; the width of the logits is still open. Throws Error for a value that no spec has.
  RoutingSpec spec() const {
    RoutingSpec spec = spec_;
    ZEXPERT_CHECK(!num_identity_experts_ || *num_identity_experts_ >= 0,
                  "num_identity_experts must not be negative, got ", *num_identity_experts_);
    spec.num_identity_experts = num_identity_experts_.value_or(kFromLogits);
    spec.scoring_func = parse_scoring_func(scoring_func_);
    return spec;
  }

 private:
  friend struct ReadArgument<RoutingArguments>;
  RoutingSpec spec_;  ///< of the arguments that need no check
  std::optional<int64_t> num_identity_experts_;
  std::string scoring_func_;
};

template <>
struct ReadArgument<RoutingArguments> {
  static constexpr uint64_t kCount = 10;
  static RoutingArguments read(ArgumentReader& reader) {
    const auto top_k = reader.read<int64_t>();
    return read_keywords(reader, top_k);
  }

  static RoutingArguments read_keywords(ArgumentReader& reader, int64_t top_k) {
    RoutingArguments arguments;
    arguments.spec_.top_k = top_k;
    arguments.spec_.num_real_experts = reader.read<int64_t>();
    arguments.num_identity_experts_ = reader.read<std::optional<int64_t>>();
    arguments.spec_.num_constant_experts = reader.read<int64_t>();
    arguments.scoring_func_ = reader.read<std::string>();
    arguments.spec_.renormalize = reader.read<bool>();
    arguments.spec_.drop_before_renormalize = reader.read<bool>();
    arguments.spec_.routed_scaling_factor = reader.read<double>();
    arguments.spec_.num_expert_group = reader.read<int64_t>();
    arguments.spec_.topk_group = reader.read<int64_t>();
    return arguments;
  }
};

struct RoutingWithChoices {
  RoutingArguments arguments;
  std::optional<Tensor> choices;
};

template <>
struct ReadArgument<RoutingWithChoices> {
  static constexpr uint64_t kCount = ReadArgument<RoutingArguments>::kCount + 1;
  static RoutingWithChoices read(ArgumentReader& reader) {
    const auto top_k = reader.read<int64_t>();
    auto choices = reader.read<std::optional<Tensor>>();
    return {ReadArgument<RoutingArguments>::read_keywords(reader, top_k), std::move(choices)};
  }
};

HIDDEN_NAMESPACE_END(zexpert, ops)
