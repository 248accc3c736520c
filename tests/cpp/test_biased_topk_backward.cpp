// SPDX-License-Identifier: Apache-2.0
// biased_topk_backward_cpu: in float64 against finite differences of biased_topk_cpu, in every other type against
// float64.
#include <gtest/gtest.h>

#include "testing.h"
#include "zexpert/biased_topk.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

RoutingSpec every_kind(ScoringFunc scoring_func, bool renormalize, bool drop_before_renormalize, int64_t groups) {
  RoutingSpec spec;
  spec.top_k = 6;
  spec.num_real_experts = 8;
  spec.num_identity_experts = 5;
  spec.num_constant_experts = 3;
  spec.scoring_func = scoring_func;
  spec.renormalize = renormalize;
  spec.drop_before_renormalize = drop_before_renormalize;
  spec.routed_scaling_factor = 2.5;
  spec.num_expert_group = groups;
  spec.topk_group = groups > 1 ? 2 : 1;
  return spec.for_width(20);
}

std::vector<RoutingSpec> every_spec() {
  std::vector<RoutingSpec> specs;
  for (const auto scoring_func : {ScoringFunc::kSoftmax, ScoringFunc::kSigmoid, ScoringFunc::kSqrtSoftplus}) {
    for (const int64_t groups : {1, 4}) {
      specs.push_back(every_kind(scoring_func, false, false, groups));
      specs.push_back(every_kind(scoring_func, true, false, groups));
      specs.push_back(every_kind(scoring_func, true, true, groups));
    }
  }
  return specs;
}

std::string text(const RoutingSpec& spec) {
  return std::string(name(spec.scoring_func)) + (spec.renormalize ? ", renormalize" : "") +
         (spec.drop_before_renormalize ? ", drop first" : "") + ", " + std::to_string(spec.num_expert_group) +
         " groups";
}

/// Logits of type T with upstream gradients; both exact in float64.
template <typename T>
struct Call {
  using Weight = accumulate_t<T>;

  Call(Random& random, const RoutingSpec& routing, int64_t tokens)
      : spec(routing),
        num_tokens(tokens),
        logits(tokens, routing.num_logits, routing.num_logits + 3),
        bias(random.normal<float>(routing.num_logits, 0.3)),
        grad_topk_weights(random.normal<Weight>(tokens * routing.top_k)),
        grad_zero_weight(random.normal<Weight>(tokens)),
        grad_constant_weight(random.normal<Weight>(tokens * routing.num_constant_experts)),
        grad_logits(tokens, routing.num_logits, routing.num_logits) {
    logits.randomize(random, 2);
  }

  BiasedTopKBackwardParams params() {
    BiasedTopKBackwardParams params;
    params.grad_topk_weights = grad_topk_weights.data();
    params.grad_zero_weight = grad_zero_weight.data();
    params.grad_constant_weight = grad_constant_weight.data();
    params.logits = logits.data();
    params.logits_type = TypeTraits<T>::kType;
    params.logits_row_stride = logits.stride();
    params.bias = bias.data();
    params.bias_type = ScalarType::kFloat32;
    params.grad_logits = grad_logits.data();
    params.num_tokens = num_tokens;
    params.spec = spec;
    return params;
  }

  /// The upstream gradients' product with what biased_topk gives.
  double loss() {
    std::vector<Weight> topk_weights(grad_topk_weights.size());
    std::vector<int32_t> topk_ids(grad_topk_weights.size());
    std::vector<Weight> zero_weight(grad_zero_weight.size());
    std::vector<Weight> constant_weight(grad_constant_weight.size());
    BiasedTopKParams params;
    params.logits = logits.data();
    params.logits_type = TypeTraits<T>::kType;
    params.logits_row_stride = logits.stride();
    params.bias = bias.data();
    params.bias_type = ScalarType::kFloat32;
    params.topk_weights = topk_weights.data();
    params.topk_ids = topk_ids.data();
    params.zero_weight = zero_weight.data();
    params.constant_weight = constant_weight.data();
    params.num_tokens = num_tokens;
    params.spec = spec;
    biased_topk_cpu(params);
    const auto product = [](const std::vector<Weight>& a, const std::vector<Weight>& b) {
      double sum = 0;
      for (size_t i = 0; i < a.size(); ++i) sum += static_cast<double>(a[i]) * static_cast<double>(b[i]);
      return sum;
    };
    return product(grad_topk_weights, topk_weights) + product(grad_zero_weight, zero_weight) +
           product(grad_constant_weight, constant_weight);
  }

  Call<double> in_float64() const {
    Random random;
    Call<double> copy(random, spec, num_tokens);
    for (int64_t t = 0; t < num_tokens; ++t) {
      for (int64_t i = 0; i < spec.num_logits; ++i) copy.logits.row(t)[i] = static_cast<double>(logits.row(t)[i]);
    }
    copy.bias = bias;
    copy.grad_topk_weights.assign(grad_topk_weights.begin(), grad_topk_weights.end());
    copy.grad_zero_weight.assign(grad_zero_weight.begin(), grad_zero_weight.end());
    copy.grad_constant_weight.assign(grad_constant_weight.begin(), grad_constant_weight.end());
    return copy;
  }

  RoutingSpec spec;
  int64_t num_tokens;
  Rows<T> logits;
  std::vector<float> bias;
  std::vector<Weight> grad_topk_weights, grad_zero_weight, grad_constant_weight;
  Rows<T> grad_logits;
};

TEST(BiasedTopKBackward, FiniteDifferences) {
  constexpr double kStep = 1e-6;
  Random random;
  for (const RoutingSpec& spec : every_spec()) {
    Call<double> call(random, spec, 5);
    biased_topk_backward_cpu(call.params());
    for (int64_t t = 0; t < call.num_tokens; ++t) {
      for (int64_t i = 0; i < spec.num_logits; ++i) {
        double& logit = call.logits.row(t)[i];
        const double held = logit;
        logit = held + kStep;
        const double above = call.loss();
        logit = held - kStep;
        const double below = call.loss();
        logit = held;
        EXPECT_NEAR(call.grad_logits.row(t)[i], (above - below) / (2 * kStep), 1e-7)
            << text(spec) << ", token " << t << ", expert " << i;
      }
    }
  }
}

template <typename T>
class BiasedTopKBackwardTypes : public ::testing::Test {};
TYPED_TEST_SUITE(BiasedTopKBackwardTypes, FloatingTypes);

TYPED_TEST(BiasedTopKBackwardTypes, AgreesWithFloat64) {
  using T = TypeParam;
  // Gradients are at most a few units; weights are good to a few units in the last place of the accumulation type.
  const double accumulated = 64 * TypeTraits<accumulate_t<T>>::kHalfUlp;
  Random random;
  for (const RoutingSpec& spec : every_spec()) {
    Call<T> call(random, spec, 33);
    Call<double> exact = call.in_float64();
    biased_topk_backward_cpu(call.params());
    biased_topk_backward_cpu(exact.params());
    EXPECT_TRUE(call.grad_logits.untouched_outside(0, call.num_tokens));
    for (int64_t t = 0; t < call.num_tokens; ++t) {
      for (int64_t i = 0; i < spec.num_logits; ++i) {
        const double expected = exact.grad_logits.row(t)[i];
        EXPECT_NEAR(static_cast<double>(call.grad_logits.row(t)[i]), expected,
                    accumulated + TypeTraits<T>::kHalfUlp * std::abs(expected))
            << text(spec) << ", token " << t << ", expert " << i;
      }
    }
  }
}

TYPED_TEST(BiasedTopKBackwardTypes, ThreadsChangeNoBit) {
  using T = TypeParam;
  Random random;
  RoutingSpec spec;
  spec.top_k = 12;
  spec.num_real_experts = 512;
  spec = spec.for_width(777);
  Call<T> serial(random, spec, 100);
  Call<T> threaded = serial;
  biased_topk_backward_cpu(serial.params());
  for (const int64_t threads : {2, 5}) {
    const ScopedThreads scope(threads);
    biased_topk_backward_cpu(threaded.params());
    EXPECT_TRUE(threaded.grad_logits == serial.grad_logits) << threads << " threads";
  }
}

TEST(BiasedTopKBackward, MaskedLogitsHaveNoGradient) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  Random random;
  for (const RoutingSpec& spec : every_spec()) {
    Call<float> call(random, spec, 3);
    call.logits.row(0)[2] = kNan;
    call.logits.row(0)[7] = -kInfinity;
    std::fill_n(call.logits.row(1), 20, kNan);
    std::fill_n(call.logits.row(2) + 3, 17, kInfinity);  // fewer than top_k are choosable
    biased_topk_backward_cpu(call.params());
    for (int64_t t = 0; t < 3; ++t) {
      for (int64_t i = 0; i < 20; ++i) {
        const float gradient = call.grad_logits.row(t)[i];
        EXPECT_TRUE(std::isfinite(gradient)) << text(spec) << ", token " << t << ", expert " << i;
        EXPECT_TRUE(std::isfinite(call.logits.row(t)[i]) || gradient == 0) << text(spec);
      }
    }
  }
}

TEST(BiasedTopKBackward, GivenChoicesHaveTheSameGradient) {
  Random random;
  for (const RoutingSpec& spec : every_spec()) {
    Call<float> call(random, spec, 9);
    call.logits.row(3)[2] = std::numeric_limits<float>::quiet_NaN();
    std::vector<int32_t> choices(static_cast<size_t>(call.num_tokens * spec.top_k));
    BiasedTopKBackwardParams params = call.params();
    BiasedTopKChoicesParams choice;
    static_cast<RoutingInputs&>(choice) = params;
    choice.chosen = choices.data();
    biased_topk_choices_cpu(choice);
    biased_topk_backward_cpu(params);
    Call<float> given = call;
    params = given.params();
    params.bias = nullptr;
    params.choices = choices.data();
    biased_topk_backward_cpu(params);
    EXPECT_TRUE(given.grad_logits == call.grad_logits) << text(spec);
  }
}

TEST(BiasedTopKBackward, TiesSendTheGradientToTheChosen) {
  Random random;
  RoutingSpec spec;
  spec.top_k = 2;
  spec.num_real_experts = 4;
  spec.scoring_func = ScoringFunc::kSigmoid;
  Call<float> call(random, spec.for_width(4), 1);
  std::fill_n(call.logits.data(), 4, 0.0F);
  std::fill(call.bias.begin(), call.bias.end(), 0.0F);
  call.grad_topk_weights = {8.0F, 4.0F};
  biased_topk_backward_cpu(call.params());
  EXPECT_EQ(call.grad_logits.data()[0], 2.0F);
  EXPECT_EQ(call.grad_logits.data()[1], 1.0F);
  EXPECT_EQ(call.grad_logits.data()[2], 0.0F);
  EXPECT_EQ(call.grad_logits.data()[3], 0.0F);
}

TEST(BiasedTopKBackward, NothingToDo) {
  BiasedTopKBackwardParams params;
  params.spec = every_kind(ScoringFunc::kSoftmax, false, false, 1);
  biased_topk_backward_cpu(params);
}

}  // namespace
}  // namespace zexpert
