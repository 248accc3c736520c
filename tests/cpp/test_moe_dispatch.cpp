// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_dispatch.h"

#include <gtest/gtest.h>

#include "testing.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

constexpr int64_t kRanks = 3;
constexpr int64_t kLocalExperts = 5;
constexpr int64_t kTopK = 4;
constexpr int32_t kUnwritten = 77;

/// What a rank receives: rows that notice stray writes, ids and weights.
template <typename T>
struct Received {
  Rows<T> rows;
  std::vector<int32_t> ids;
  std::vector<accumulate_t<T>> weights;

  Received(int64_t max_tokens, int64_t hidden_size)
      : rows(kRanks * max_tokens, hidden_size, hidden_size),
        ids(static_cast<size_t>(kRanks * max_tokens * kTopK), kUnwritten),
        weights(ids.size(), accumulate_t<T>(kUnwritten)) {}
};

/// Tokens of one rank, the memory of all, and the params that connect them.
template <typename T>
struct Case {
  int64_t num_tokens, max_tokens, hidden_size;
  Rows<T> hidden_states;
  std::vector<int64_t> topk_ids;
  std::vector<accumulate_t<T>> topk_weights;
  std::vector<Received<T>> received;
  std::vector<int32_t> slot_rows, row_tokens;
  MoeDispatchParams params;

  Case(Random& random, int64_t tokens, int64_t most_tokens, int64_t size)
      : num_tokens(tokens),
        max_tokens(most_tokens),
        hidden_size(size),
        hidden_states(tokens, size, size + 5),
        topk_ids(random.integers<int64_t>(tokens * kTopK, -1, kRanks * kLocalExperts - 1)),
        topk_weights(random.normal<accumulate_t<T>>(tokens * kTopK)),
        received(static_cast<size_t>(kRanks), Received<T>(most_tokens, size)),
        slot_rows(static_cast<size_t>(tokens * kRanks), kUnwritten),
        row_tokens(static_cast<size_t>(kRanks * most_tokens), kUnwritten) {
    hidden_states.randomize(random);
    params.hidden_states = hidden_states.data();
    params.topk_ids = topk_ids.data();
    params.topk_weights = topk_weights.data();
    for (size_t rank = 0; rank < received.size(); ++rank) {
      params.rows.of_rank[rank] = received[rank].rows.data();
      params.ids.of_rank[rank] = received[rank].ids.data();
      params.weights.of_rank[rank] = received[rank].weights.data();
    }
    params.slot_rows = slot_rows.data();
    params.row_tokens = row_tokens.data();
    params.data_type = TypeTraits<T>::kType;
    params.ids_type = ScalarType::kInt64;
    params.rank = 1;
    params.num_ranks = kRanks;
    params.max_tokens = max_tokens;
    params.num_local_experts = kLocalExperts;
    params.num_tokens = num_tokens;
    params.top_k = kTopK;
    params.hidden_size = hidden_size;
    params.hidden_row_stride = hidden_states.stride();
  }
};

template <typename T>
class MoeDispatch : public ::testing::Test {};
TYPED_TEST_SUITE(MoeDispatch, FloatingTypes);

TYPED_TEST(MoeDispatch, SendsEveryTokenOnceToEachRankOfItsExperts) {
  using T = TypeParam;
  Random random;
  for (const int64_t hidden_size : {1, 7, 1024}) {
    for (const int64_t num_tokens : {1, 7, 300}) {
      for (const int64_t threads : {1, 5}) {
        const ScopedThreads scope(threads);
        Case<T> given(random, num_tokens, num_tokens + 2, hidden_size);
        moe_dispatch_cpu(given.params);
        for (int64_t peer = 0; peer < kRanks; ++peer) {
          const Received<T>& received = given.received[static_cast<size_t>(peer)];
          const int64_t first_row = given.params.rank * given.max_tokens;
          int64_t position = 0;
          for (int64_t token = 0; token < num_tokens; ++token) {
            std::vector<int32_t> local;
            for (int64_t k = 0; k < kTopK; ++k) {
              const int64_t id = given.topk_ids[static_cast<size_t>(token * kTopK + k)] - peer * kLocalExperts;
              local.push_back(id >= 0 && id < kLocalExperts ? static_cast<int32_t>(id) : -1);
            }
            const bool is_sent = *std::max_element(local.begin(), local.end()) >= 0;
            const int64_t place = peer * given.max_tokens + position;
            EXPECT_EQ(given.slot_rows[static_cast<size_t>(token * kRanks + peer)], is_sent ? place : -1);
            if (!is_sent) {
              continue;
            }
            const int64_t row = first_row + position;
            EXPECT_EQ(given.row_tokens[static_cast<size_t>(place)], token);
            EXPECT_EQ(std::memcmp(received.rows.row(row), given.hidden_states.row(token),
                                  static_cast<size_t>(hidden_size) * sizeof(T)),
                      0);
            for (int64_t k = 0; k < kTopK; ++k) {
              const auto slot = static_cast<size_t>(row * kTopK + k);
              EXPECT_EQ(received.ids[slot], local[static_cast<size_t>(k)]);
              EXPECT_EQ(received.weights[slot], given.topk_weights[static_cast<size_t>(token * kTopK + k)]);
            }
            ++position;
          }
          EXPECT_TRUE(received.rows.untouched_outside(first_row, first_row + position));
          for (int64_t empty = position; empty < given.max_tokens; ++empty) {
            EXPECT_EQ(given.row_tokens[static_cast<size_t>(peer * given.max_tokens + empty)], -1);
            EXPECT_EQ(received.ids[static_cast<size_t>((first_row + empty) * kTopK)], -1);
          }
          EXPECT_EQ(received.ids[0], kUnwritten) << "the share of another rank changed";
        }
      }
    }
  }
}

TYPED_TEST(MoeDispatch, NoTokensLeaveEmptyPlaces) {
  using T = TypeParam;
  Random random;
  Case<T> given(random, 0, 3, 8);
  moe_dispatch_cpu(given.params);
  for (const Received<T>& received : given.received) {
    EXPECT_TRUE(received.rows.untouched());
    EXPECT_EQ(received.ids[static_cast<size_t>(given.params.rank * 3 * kTopK)], -1);
  }
  EXPECT_EQ(given.row_tokens, std::vector<int32_t>(static_cast<size_t>(kRanks * 3), -1));

  MoeDispatchParams nothing;
  nothing.data_type = TypeTraits<T>::kType;
  moe_dispatch_cpu(nothing);
}

TYPED_TEST(MoeDispatch, RefusesIdsOutOfRangeAndWritesNothing) {
  using T = TypeParam;
  Random random;
  for (const int64_t bad : {int64_t{-2}, int64_t{15}, int64_t{1} << 40}) {
    Case<T> given(random, 4, 4, 8);
    given.topk_ids[9] = bad;
    EXPECT_EQ(error_of([&] { moe_dispatch_cpu(given.params); }),
              "topk_ids must be in [-1, 15), got " + std::to_string(bad));
    for (const Received<T>& received : given.received) {
      EXPECT_TRUE(received.rows.untouched());
      EXPECT_EQ(received.ids[0], kUnwritten);
    }
    EXPECT_EQ(given.row_tokens[0], kUnwritten);
  }
}

TEST(MoeDispatchParams, AreChecked) {
  Random random;
  const Case<float> given(random, 4, 4, 8);
  const auto error = [&](auto change) {
    MoeDispatchParams params = given.params;
    change(params);
    return error_of([&] { moe_dispatch_cpu(params); });
  };
  EXPECT_EQ(error([](auto& params) { params.rank = 3; }), "rank must be between 0 and 2, got 3");
  EXPECT_EQ(error([](auto& params) { params.num_ranks = 65; }), "num_ranks must be between 1 and 64, got 65");
  EXPECT_EQ(error([](auto& params) { params.num_tokens = 5; }), "num_tokens must be at most max_tokens (4), got 5");
  EXPECT_EQ(error([](auto& params) { params.top_k = -1; }), "top_k must not be negative, got -1");
  EXPECT_EQ(error([](auto& params) { params.max_tokens = int64_t{1} << 30; }),
            "num_ranks * max_tokens must be below 2^31, got 3 * 1073741824");
  EXPECT_EQ(error([](auto& params) { params.ids_type = ScalarType::kFloat32; }),
            "topk_ids must be int32 or int64, got float32");
  EXPECT_EQ(error([](auto& params) { params.rows.of_rank[2] = nullptr; }), "rows of rank 2 must not be null");
  EXPECT_EQ(error([](auto& params) { params.ids.of_rank[0] = nullptr; }), "ids of rank 0 must not be null");
  EXPECT_EQ(error([](auto& params) { params.slot_rows = nullptr; }), "slot_rows must not be null");
}

}  // namespace
}  // namespace zexpert
