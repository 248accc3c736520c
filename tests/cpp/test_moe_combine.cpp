// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_combine.h"

#include <gtest/gtest.h>

#include "testing.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

constexpr int64_t kRanks = 3;
constexpr int64_t kRows = 11;
constexpr int64_t kTopK = 4;
constexpr int64_t kRank = 2;

template <typename T>
struct Case {
  int64_t max_tokens, hidden_size;
  Rows<T> rows;
  std::vector<int32_t> slot_rows;
  std::vector<accumulate_t<T>> topk_weights;
  std::vector<Rows<T>> out;
  MoeCombineParams params;

  Case(Random& random, int64_t most_tokens, int64_t size)
      : max_tokens(most_tokens),
        hidden_size(size),
        rows(kRows, size, size + 3),
        slot_rows(random.integers<int32_t>(kRanks * most_tokens * kTopK, -1, kRows - 1)),
        topk_weights(random.normal<accumulate_t<T>>(kRanks * most_tokens * kTopK)),
        out(static_cast<size_t>(kRanks), Rows<T>(kRanks * most_tokens, size, size)) {
    rows.randomize(random);
    // Every third place has no slots.
    for (int64_t place = 0; place < kRanks * max_tokens; place += 3) {
      std::fill_n(slot_rows.begin() + place * kTopK, kTopK, -1);
    }
    params.rows = rows.data();
    params.slot_rows = slot_rows.data();
    params.topk_weights = topk_weights.data();
    for (size_t rank = 0; rank < out.size(); ++rank) params.out.of_rank[rank] = out[rank].data();
    params.data_type = TypeTraits<T>::kType;
    params.rank = kRank;
    params.num_ranks = kRanks;
    params.max_tokens = max_tokens;
    params.top_k = kTopK;
    params.num_rows = kRows;
    params.hidden_size = hidden_size;
    params.rows_row_stride = rows.stride();
  }
};

template <typename T>
class MoeCombine : public ::testing::Test {};
TYPED_TEST_SUITE(MoeCombine, FloatingTypes);

TYPED_TEST(MoeCombine, WritesTheSumsToTheRanksOfTheTokens) {
  using T = TypeParam;
  Random random;
  for (const bool weighted : {true, false}) {
    for (const int64_t hidden_size : {1, 7, 200}) {
      Case<T> given(random, 5, hidden_size);
      if (!weighted) {
        given.params.topk_weights = nullptr;
      }
      moe_combine_cpu(given.params);
      for (int64_t peer = 0; peer < kRanks; ++peer) {
        Rows<T>& out = given.out[static_cast<size_t>(peer)];
        const Rows<T> unwritten(kRanks * given.max_tokens, hidden_size, hidden_size);
        EXPECT_TRUE(out.untouched_outside(kRank * given.max_tokens, (kRank + 1) * given.max_tokens));
        for (int64_t i = 0; i < given.max_tokens; ++i) {
          const int64_t place = peer * given.max_tokens + i;
          const T* actual = out.row(kRank * given.max_tokens + i);
          bool any = false;
          for (int64_t column = 0; column < hidden_size; ++column) {
            double sum = 0;
            double magnitude = 0;
            for (int64_t k = 0; k < kTopK; ++k) {
              const auto slot = static_cast<size_t>(place * kTopK + k);
              if (given.slot_rows[slot] < 0) {
                continue;
              }
              any = true;
              const double weight = weighted ? static_cast<double>(given.topk_weights[slot]) : 1.0;
              const double product = weight * static_cast<double>(given.rows.row(given.slot_rows[slot])[column]);
              sum += product;
              magnitude += std::abs(product);
            }
            if (any) {
              EXPECT_TRUE(is_rounded_sum(actual[column], sum, magnitude, kTopK)) << "place " << place;
            }
          }
          if (!any) {
            EXPECT_EQ(std::memcmp(actual, unwritten.row(0), static_cast<size_t>(hidden_size) * sizeof(T)), 0);
          }
        }
      }
    }
  }
}

TYPED_TEST(MoeCombine, NothingToDo) {
  using T = TypeParam;
  Random random;
  Case<T> given(random, 4, 8);
  given.params.top_k = 0;
  moe_combine_cpu(given.params);
  for (const Rows<T>& out : given.out) EXPECT_TRUE(out.untouched());

  MoeCombineParams nothing;
  nothing.data_type = TypeTraits<T>::kType;
  moe_combine_cpu(nothing);
}

TYPED_TEST(MoeCombine, RefusesRowsOutOfRangeAndWritesNothing) {
  using T = TypeParam;
  Random random;
  for (const int32_t bad : {-2, 11, std::numeric_limits<int32_t>::max()}) {
    Case<T> given(random, 4, 8);
    given.slot_rows.back() = bad;
    EXPECT_EQ(error_of([&] { moe_combine_cpu(given.params); }),
              "slot_rows must be in [-1, 11), got " + std::to_string(bad));
    for (const Rows<T>& out : given.out) EXPECT_TRUE(out.untouched());
  }
}

TEST(MoeCombineParams, AreChecked) {
  Random random;
  const Case<float> given(random, 4, 8);
  const auto error = [&](auto change) {
    MoeCombineParams params = given.params;
    change(params);
    return error_of([&] { moe_combine_cpu(params); });
  };
  EXPECT_EQ(error([](auto& params) { params.rank = -1; }), "rank must be between 0 and 2, got -1");
  EXPECT_EQ(error([](auto& params) { params.num_rows = -1; }), "num_rows must not be negative, got -1");
  EXPECT_EQ(error([](auto& params) { params.data_type = ScalarType::kInt32; }),
            "data must be of a floating type, got int32");
  EXPECT_EQ(error([](auto& params) { params.out.of_rank[1] = nullptr; }), "out of rank 1 must not be null");
  EXPECT_EQ(error([](auto& params) { params.slot_rows = nullptr; }), "slot_rows must not be null");
  EXPECT_EQ(error([](auto& params) { params.rows = nullptr; }), "rows must not be null");
}

}  // namespace
}  // namespace zexpert
