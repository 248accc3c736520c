// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include "testing.h"
#include "zexpert/zero_expert_accumulate.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

template <typename T>
class ZeroExpertAccumulateBackward : public ::testing::Test {
 protected:
  using Weight = accumulate_t<T>;

  struct Call {
    Call(Random& random, int64_t tokens, int64_t hidden)
        : num_tokens(tokens),
          hidden_size(hidden),
          grad_out(tokens, hidden, hidden + 5),
          hidden_states(tokens, hidden, hidden + 3),
          zero_weight(random.normal<Weight>(tokens)),
          grad_hidden_states(tokens, hidden, hidden),
          grad_zero_weight(tokens, 1, 1) {
      grad_out.randomize(random);
      hidden_states.randomize(random);
    }

    ZeroExpertAccumulateBackwardParams params() {
      ZeroExpertAccumulateBackwardParams params;
      params.grad_out = grad_out.data();
      params.hidden_states = hidden_states.data();
      params.zero_weight = zero_weight.data();
      params.grad_hidden_states = grad_hidden_states.data();
      params.grad_zero_weight = grad_zero_weight.data();
      params.data_type = TypeTraits<T>::kType;
      params.num_tokens = num_tokens;
      params.hidden_size = hidden_size;
      params.grad_out_row_stride = grad_out.stride();
      params.hidden_row_stride = hidden_states.stride();
      return params;
    }

    int64_t num_tokens, hidden_size;
    Rows<T> grad_out, hidden_states;
    std::vector<Weight> zero_weight;
    Rows<T> grad_hidden_states;
    Rows<Weight> grad_zero_weight;
  };
};
TYPED_TEST_SUITE(ZeroExpertAccumulateBackward, FloatingTypes);

TYPED_TEST(ZeroExpertAccumulateBackward, EverySize) {
  using Fixture = ZeroExpertAccumulateBackward<TypeParam>;
  Random random;
  for (const int64_t hidden_size : {0, 1, 7, 200, 257, 1024}) {
    for (const int64_t num_tokens : {0, 1, 7}) {
      typename Fixture::Call call(random, num_tokens, hidden_size);
      zero_expert_accumulate_backward_cpu(call.params());

      EXPECT_TRUE(call.grad_hidden_states.untouched_outside(0, num_tokens));
      EXPECT_TRUE(call.grad_zero_weight.untouched_outside(0, num_tokens));
      for (int64_t t = 0; t < num_tokens; ++t) {
        double dot = 0;
        double magnitude = 0;
        for (int64_t h = 0; h < hidden_size; ++h) {
          const auto gradient = static_cast<double>(call.grad_out.row(t)[h]);
          const double product = gradient * static_cast<double>(call.hidden_states.row(t)[h]);
          const double scaled = gradient * static_cast<double>(call.zero_weight[static_cast<size_t>(t)]);
          dot += product;
          magnitude += std::abs(product);
          EXPECT_TRUE(is_rounded_sum(call.grad_hidden_states.row(t)[h], scaled, std::abs(scaled), 1))
              << "token " << t << ", column " << h << " of " << hidden_size;
        }
        EXPECT_TRUE(is_rounded_sum(*call.grad_zero_weight.row(t), dot, magnitude, hidden_size))
            << "token " << t << ", hidden_size " << hidden_size;
      }
    }
  }
}

TYPED_TEST(ZeroExpertAccumulateBackward, ThreadsChangeNoBit) {
  using Fixture = ZeroExpertAccumulateBackward<TypeParam>;
  Random random;
  typename Fixture::Call serial(random, 67, 1031);
  typename Fixture::Call threaded = serial;
  zero_expert_accumulate_backward_cpu(serial.params());
  for (const int64_t threads : {2, 5}) {
    const ScopedThreads scope(threads);
    zero_expert_accumulate_backward_cpu(threaded.params());
    EXPECT_TRUE(threaded.grad_hidden_states == serial.grad_hidden_states) << threads << " threads";
    EXPECT_TRUE(threaded.grad_zero_weight == serial.grad_zero_weight) << threads << " threads";
  }
}

}  // namespace
}  // namespace zexpert
