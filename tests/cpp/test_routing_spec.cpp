// SPDX-License-Identifier: Apache-2.0
#include "zexpert/routing_spec.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>

#include "zexpert/enums.h"
#include "zexpert/error.h"

namespace zexpert {
namespace {

RoutingSpec longcat() {
  RoutingSpec spec;
  spec.top_k = 12;
  spec.num_real_experts = 512;
  spec.num_logits = 768;
  spec.num_identity_experts = 256;
  spec.routed_scaling_factor = 6.0;
  return spec;
}

template <typename Change>
std::string error_after(const Change& change) {
  RoutingSpec spec = longcat();
  change(spec);
  try {
    spec.validate();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(RoutingSpec, PublishedShapesAreValid) {
  longcat().validate();

  RoutingSpec grouped_drop;  // ZEDA on GLM-4.7-Flash
  grouped_drop.top_k = 4;
  grouped_drop.num_real_experts = 64;
  grouped_drop.num_logits = 96;
  grouped_drop.num_identity_experts = 0;
  grouped_drop.scoring_func = ScoringFunc::kSigmoid;
  grouped_drop.num_expert_group = 8;
  grouped_drop.topk_group = 4;
  grouped_drop.validate();
  EXPECT_EQ(grouped_drop.num_drop_experts(), 32);
}

TEST(RoutingSpec, RefusesAnUnknownScoringFunction) {
  EXPECT_EQ(error_after([](RoutingSpec& spec) { spec.scoring_func = static_cast<ScoringFunc>(17); }),
            "scoring_func must be a ScoringFunc, got 17");
}

TEST(RoutingSpec, RefusesFieldsOutOfRange) {
  EXPECT_EQ(error_after([](RoutingSpec& spec) { spec.top_k = 0; }), "top_k must be between 1 and 64, got 0");
  EXPECT_EQ(error_after([](RoutingSpec& spec) { spec.top_k = 65; }), "top_k must be between 1 and 64, got 65");
  EXPECT_EQ(error_after([](RoutingSpec& spec) { spec.num_real_experts = 0; }),
            "num_real_experts must be at least 1, got 0");
  EXPECT_EQ(error_after([](RoutingSpec& spec) { spec.num_identity_experts = -2; }),
            "num_identity_experts must not be negative, got -2");
  EXPECT_EQ(error_after([](RoutingSpec& spec) { spec.num_constant_experts = -1; }),
            "num_constant_experts must not be negative, got -1");
  EXPECT_EQ(
      error_after([](RoutingSpec& spec) { spec.routed_scaling_factor = std::numeric_limits<double>::infinity(); }),
      "routed_scaling_factor must be finite, got inf");
}

TEST(RoutingSpec, RefusesFieldsThatDisagree) {
  EXPECT_EQ(error_after([](RoutingSpec& spec) { spec.num_expert_group = 3; }),
            "num_expert_group must divide the number of real experts (512), got 3");
  EXPECT_EQ(error_after([](RoutingSpec& spec) { spec.topk_group = 2; }),
            "topk_group must be between 1 and num_expert_group (1), got 2");
  EXPECT_EQ(error_after([](RoutingSpec& spec) { spec.num_logits = 767; }),
            "num_logits (the width of the logits) must be at least 768, the real, identity and constant experts "
            "together, got 767");
  EXPECT_EQ(error_after([](RoutingSpec& spec) {
              spec.num_real_experts = 4;
              spec.num_identity_experts = 0;
              spec.num_logits = 6;
            }),
            "top_k must be at most the number of experts (6), got 12");
  EXPECT_EQ(error_after([](RoutingSpec& spec) {
              spec.num_identity_experts = std::numeric_limits<int64_t>::max();
              spec.num_constant_experts = std::numeric_limits<int64_t>::max();
            }),
            "num_logits (the width of the logits) must be at least 9223372036854775807, the real, identity and "
            "constant experts together, got 768");
}

TEST(RoutingSpec, DropsBeforeRenormalizingOnlyWhereBothHappen) {
  EXPECT_EQ(error_after([](RoutingSpec& spec) { spec.drop_before_renormalize = true; }),
            "drop_before_renormalize needs renormalize, got false");
  EXPECT_EQ(error_after([](RoutingSpec& spec) { spec.renormalize = spec.drop_before_renormalize = true; }),
            "drop_before_renormalize needs drop experts, got none of 768 experts");
  const auto with_open_counts = [](int64_t num_identity_experts) {
    return [num_identity_experts](RoutingSpec& spec) {
      spec.renormalize = spec.drop_before_renormalize = true;
      spec.num_identity_experts = num_identity_experts;
      spec.num_logits = kFromLogits;
    };
  };
  EXPECT_EQ(error_after(with_open_counts(kFromLogits)),
            "drop_before_renormalize needs drop experts, got none: num_identity_experts must be given");
  EXPECT_EQ(error_after(with_open_counts(255)), "no error");
  RoutingSpec spec = longcat();
  with_open_counts(255)(spec);
  EXPECT_EQ(spec.for_width(768).num_drop_experts(), 1);
  EXPECT_THROW(spec.for_width(767), Error);
}

TEST(RoutingSpec, TheOlderNameOfTheWidthIsTheWidth) {
  RoutingSpec spec;
  EXPECT_EQ(spec.num_experts, kFromLogits);
  spec.num_experts = 5;
  EXPECT_EQ(spec.num_logits, 5);
}

TEST(RoutingSpec, WidthDecidesWhatIsLeftOpen) {
  RoutingSpec spec;
  spec.top_k = 2;
  spec.num_real_experts = 8;
  spec.num_constant_experts = 2;
  const RoutingSpec resolved = spec.for_width(14);
  EXPECT_EQ(resolved.num_logits, 14);
  EXPECT_EQ(resolved.num_identity_experts, 4);
  EXPECT_EQ(resolved.num_drop_experts(), 0);
  EXPECT_EQ(spec.num_logits, kFromLogits);
  EXPECT_THROW(spec.for_width(9), Error);
  EXPECT_THROW(longcat().for_width(767), Error);
  EXPECT_THROW(spec.for_width(-1), Error);
  EXPECT_TRUE(longcat().for_width(768) == longcat());
}

TEST(Enums, NamesAndParsersAreInverse) {
  for (const auto value : {ScoringFunc::kSoftmax, ScoringFunc::kSigmoid, ScoringFunc::kSqrtSoftplus}) {
    EXPECT_EQ(parse_scoring_func(name(value)), value);
  }
  for (const auto value : {ZeroExpertType::kIdentity, ZeroExpertType::kConstant, ZeroExpertType::kDrop}) {
    EXPECT_EQ(parse_zero_expert_type(name(value)), value);
  }
  EXPECT_EQ(parse_zero_expert_type("copy"), ZeroExpertType::kIdentity);
  EXPECT_EQ(parse_zero_expert_type("zero"), ZeroExpertType::kDrop);
  EXPECT_THROW(parse_scoring_func("Softmax"), Error);
  EXPECT_THROW(parse_zero_expert_type(""), Error);
}

}  // namespace
}  // namespace zexpert
