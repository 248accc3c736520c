// SPDX-License-Identifier: Apache-2.0
#include "zexpert/zero_expert_accumulate.h"

#include <gtest/gtest.h>

#include "testing.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

template <typename T>
class ZeroExpertAccumulate : public ::testing::Test {
 protected:
  using Weight = accumulate_t<T>;

  static ZeroExpertAccumulateParams params_for(const Rows<T>& hidden_states, const std::vector<Weight>& zero_weight,
                                               Rows<T>& out, int64_t hidden_size, bool accumulate) {
    ZeroExpertAccumulateParams params;
    params.hidden_states = hidden_states.row(0);
    params.zero_weight = zero_weight.data();
    params.out = out.data();
    params.data_type = TypeTraits<T>::kType;
    params.num_tokens = static_cast<int64_t>(zero_weight.size());
    params.hidden_size = hidden_size;
    params.hidden_row_stride = hidden_states.stride();
    params.out_row_stride = out.stride();
    params.accumulate = accumulate;
    return params;
  }
};
TYPED_TEST_SUITE(ZeroExpertAccumulate, FloatingTypes);

TYPED_TEST(ZeroExpertAccumulate, EverySize) {
  using T = TypeParam;
  Random random;
  for (const int64_t hidden_size : {1, 7, 200, 257, 1024}) {
    for (const int64_t num_tokens : {0, 1, 7}) {
      for (const bool accumulate : {false, true}) {
        Rows<T> hidden_states(num_tokens, hidden_size, hidden_size + 5);
        Rows<T> out(num_tokens, hidden_size, hidden_size + 2);
        hidden_states.randomize(random);
        if (accumulate) {
          out.randomize(random);
        }
        const auto zero_weight = random.normal<accumulate_t<T>>(num_tokens, 2);
        const Rows<T> before = out;
        zero_expert_accumulate_cpu(this->params_for(hidden_states, zero_weight, out, hidden_size, accumulate));

        EXPECT_TRUE(out.untouched_outside(0, num_tokens));
        for (int64_t t = 0; t < num_tokens; ++t) {
          for (int64_t h = 0; h < hidden_size; ++h) {
            const double product =
                static_cast<double>(zero_weight[static_cast<size_t>(t)]) * static_cast<double>(hidden_states.row(t)[h]);
            const double held = accumulate ? static_cast<double>(before.row(t)[h]) : 0;
            EXPECT_TRUE(is_rounded_sum(out.row(t)[h], product + held, std::abs(product) + std::abs(held), 2))
                << "token " << t << ", column " << h << " of " << hidden_size;
          }
        }
      }
    }
  }
}

TYPED_TEST(ZeroExpertAccumulate, ThreadsAndBatchChangeNoBit) {
  using T = TypeParam;
  constexpr int64_t kTokens = 67;
  constexpr int64_t kHidden = 1031;
  Random random;
  Rows<T> hidden_states(kTokens, kHidden, kHidden);
  hidden_states.randomize(random);
  const auto zero_weight = random.normal<accumulate_t<T>>(kTokens);
  Rows<T> one_by_one(kTokens, kHidden, kHidden);
  for (int64_t t = 0; t < kTokens; ++t) {
    auto params = this->params_for(hidden_states, zero_weight, one_by_one, kHidden, false);
    params.hidden_states = hidden_states.row(t);
    params.zero_weight = &zero_weight[static_cast<size_t>(t)];
    params.out = one_by_one.row(t);
    params.num_tokens = 1;
    zero_expert_accumulate_cpu(params);
  }
  for (const int64_t threads : {1, 2, 5}) {
    const ScopedThreads scope(threads);
    Rows<T> out(kTokens, kHidden, kHidden);
    zero_expert_accumulate_cpu(this->params_for(hidden_states, zero_weight, out, kHidden, false));
    EXPECT_TRUE(out == one_by_one) << threads << " threads";
  }
}

TYPED_TEST(ZeroExpertAccumulate, HugeStrides) {
  using T = TypeParam;
  SparseMemory<T> hidden_states(2 * kHugeStride + 9);
  SparseMemory<T> out(2 * kHugeStride + 9);
  if (!hidden_states.available() || !out.available()) {
    GTEST_SKIP() << "no address space for rows this far apart";
  }
  Random random;
  const auto zero_weight = random.normal<accumulate_t<T>>(3);
  for (int64_t t = 0; t < 3; ++t) random.fill(hidden_states.data() + t * kHugeStride, 9);

  ZeroExpertAccumulateParams params;
  params.hidden_states = hidden_states.data();
  params.zero_weight = zero_weight.data();
  params.out = out.data();
  params.data_type = TypeTraits<T>::kType;
  params.num_tokens = 3;
  params.hidden_size = 9;
  params.hidden_row_stride = kHugeStride;
  params.out_row_stride = kHugeStride;
  zero_expert_accumulate_cpu(params);
  for (int64_t t = 0; t < 3; ++t) {
    for (int64_t h = 0; h < 9; ++h) {
      const double product = static_cast<double>(zero_weight[static_cast<size_t>(t)]) *
                             static_cast<double>(hidden_states.data()[t * kHugeStride + h]);
      EXPECT_TRUE(is_rounded_sum(out.data()[t * kHugeStride + h], product, std::abs(product), 1));
    }
  }
}

}  // namespace
}  // namespace zexpert
