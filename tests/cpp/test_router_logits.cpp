// SPDX-License-Identifier: Apache-2.0
#include "zexpert/router_logits.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "testing.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

template <typename T>
class RouterLogits : public ::testing::Test {
 protected:
  static RouterLogitsParams params_for(Rows<T>& hidden_states, Rows<accumulate_t<T>>& weight,
                                       Rows<accumulate_t<T>>& logits, int64_t num_tokens, int64_t hidden_size,
                                       int64_t num_experts) {
    RouterLogitsParams params;
    params.hidden_states = hidden_states.data();
    params.weight = weight.data();
    params.logits = logits.data();
    params.data_type = TypeTraits<T>::kType;
    params.num_tokens = num_tokens;
    params.hidden_size = hidden_size;
    params.num_experts = num_experts;
    params.hidden_row_stride = hidden_states.stride();
    params.weight_row_stride = weight.stride();
    return params;
  }
};
TYPED_TEST_SUITE(RouterLogits, FloatingTypes);

TYPED_TEST(RouterLogits, EverySize) {
  using T = TypeParam;
  using A = accumulate_t<T>;
  Random random;
  for (const int64_t hidden_size : {0, 1, 15, 64, 1100}) {
    for (const int64_t num_experts : {0, 1, 6, 70}) {
      for (const int64_t num_tokens : {0, 1, 5, 200}) {
        Rows<T> hidden_states(num_tokens, hidden_size, hidden_size + 3);
        Rows<A> weight(num_experts, hidden_size, hidden_size + 2);
        Rows<A> logits(num_tokens, num_experts, num_experts);
        hidden_states.randomize(random);
        weight.randomize(random);
        router_logits_cpu(this->params_for(hidden_states, weight, logits, num_tokens, hidden_size, num_experts));
        EXPECT_TRUE(logits.untouched_outside(0, num_tokens));
        for (int64_t t = 0; t < num_tokens; ++t) {
          for (int64_t n = 0; n < num_experts; ++n) {
            double expected = 0;
            double magnitude = 0;
            for (int64_t h = 0; h < hidden_size; ++h) {
              const double product =
                  static_cast<double>(hidden_states.row(t)[h]) * static_cast<double>(weight.row(n)[h]);
              expected += product;
              magnitude += std::abs(product);
            }
            ASSERT_TRUE(is_rounded_sum(logits.row(t)[n], expected, magnitude, hidden_size))
                << "token " << t << " expert " << n;
          }
        }
      }
    }
  }
}

TYPED_TEST(RouterLogits, ThreadsAndBatchChangeNoBit) {
  using T = TypeParam;
  using A = accumulate_t<T>;
  constexpr int64_t kTokens = 203;  // more than are multiplied in one run
  constexpr int64_t kHiddenSize = 2100;
  constexpr int64_t kExperts = 37;
  Random random;
  Rows<T> hidden_states(kTokens, kHiddenSize, kHiddenSize);
  Rows<A> weight(kExperts, kHiddenSize, kHiddenSize);
  hidden_states.randomize(random);
  weight.randomize(random);
  Rows<A> one_by_one(kTokens, kExperts, kExperts);
  for (int64_t t = 0; t < kTokens; ++t) {
    auto params = this->params_for(hidden_states, weight, one_by_one, 1, kHiddenSize, kExperts);
    params.hidden_states = hidden_states.row(t);
    params.logits = one_by_one.row(t);
    router_logits_cpu(params);
  }
  for (const int64_t threads : {1, 2, 5}) {
    const ScopedThreads scope(threads);
    Rows<A> logits(kTokens, kExperts, kExperts);
    router_logits_cpu(this->params_for(hidden_states, weight, logits, kTokens, kHiddenSize, kExperts));
    EXPECT_TRUE(logits == one_by_one) << threads << " threads";
  }
}

TYPED_TEST(RouterLogits, ATokenThatIsNotFiniteChangesNoOther) {
  using T = TypeParam;
  using A = accumulate_t<T>;
  Random random;
  Rows<T> hidden_states(7, 100, 100);
  Rows<A> weight(5, 100, 100);
  hidden_states.randomize(random);
  weight.randomize(random);
  Rows<A> expected(7, 5, 5);
  router_logits_cpu(this->params_for(hidden_states, weight, expected, 7, 100, 5));
  hidden_states.row(2)[99] = static_cast<T>(std::numeric_limits<double>::quiet_NaN());
  hidden_states.row(4)[0] = static_cast<T>(std::numeric_limits<double>::infinity());
  Rows<A> logits(7, 5, 5);
  router_logits_cpu(this->params_for(hidden_states, weight, logits, 7, 100, 5));
  for (int64_t t = 0; t < 7; ++t) {
    for (int64_t n = 0; n < 5; ++n) {
      if (t == 2 || t == 4) {
        EXPECT_FALSE(std::isfinite(logits.row(t)[n]));
      } else {
        EXPECT_EQ(logits.row(t)[n], expected.row(t)[n]);
      }
    }
  }
}

TEST(RouterLogitsParams, BadParamsWriteNothing) {
  Rows<float> hidden_states(3, 8, 8);
  Rows<float> weight(4, 8, 8);
  Rows<float> logits(3, 4, 4);
  RouterLogitsParams good;
  good.hidden_states = hidden_states.data();
  good.weight = weight.data();
  good.logits = logits.data();
  good.num_tokens = 3;
  good.hidden_size = 8;
  good.num_experts = 4;
  good.hidden_row_stride = good.weight_row_stride = 8;
  const auto refuses = [&](auto&& change) {
    RouterLogitsParams params = good;
    change(params);
    EXPECT_THROW(router_logits_cpu(params), Error);
  };
  refuses([](RouterLogitsParams& params) { params.num_tokens = -1; });
  refuses([](RouterLogitsParams& params) { params.hidden_size = -1; });
  refuses([](RouterLogitsParams& params) { params.num_experts = -1; });
  refuses([](RouterLogitsParams& params) { params.hidden_states = nullptr; });
  refuses([](RouterLogitsParams& params) { params.weight = nullptr; });
  refuses([](RouterLogitsParams& params) { params.logits = nullptr; });
  refuses([](RouterLogitsParams& params) { params.data_type = ScalarType::kInt32; });
  EXPECT_TRUE(logits.untouched());
}

}  // namespace
}  // namespace zexpert
