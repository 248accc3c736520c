// SPDX-License-Identifier: Apache-2.0
// Threads stand for ranks.
#include "zexpert/rank_barrier.h"

#include <gtest/gtest.h>

#include <array>
#include <chrono>
#include <cmath>
#include <thread>

#include "testing.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

constexpr int64_t kRanks = 3;

struct Ranks {
  std::array<std::array<int64_t, kRanks>, kRanks> signals = {};
  std::array<int64_t, kRanks> epochs = {};
  std::array<float, kRanks> validities = {1, 1, 1};
  std::array<int32_t, kRanks> absent_ranks = {-1, -1, -1};

  RankBarrierParams params(int64_t rank, int64_t timeout_ms) {
    RankBarrierParams params;
    for (size_t peer = 0; peer < signals.size(); ++peer) params.signals.of_rank[peer] = signals[peer].data();
    params.epoch = &epochs[static_cast<size_t>(rank)];
    params.validity = &validities[static_cast<size_t>(rank)];
    params.absent_rank = &absent_ranks[static_cast<size_t>(rank)];
    params.rank = rank;
    params.num_ranks = kRanks;
    params.timeout_ms = timeout_ms;
    return params;
  }

  template <typename Body>
  void run(const Body& body) {
    std::vector<std::thread> threads;
    for (int64_t rank = 0; rank < kRanks; ++rank) threads.emplace_back(body, rank);
    for (std::thread& thread : threads) thread.join();
  }
};

TEST(RankBarrier, WhatAllWroteBeforeIsThereBehind) {
  constexpr int64_t kSteps = 200;
  Ranks ranks;
  std::array<int64_t, kRanks> written = {};
  std::array<int64_t, kRanks> mistakes = {};
  ranks.run([&](int64_t rank) {
    for (int64_t step = 1; step <= kSteps; ++step) {
      written[static_cast<size_t>(rank)] = step;
      rank_barrier_cpu(ranks.params(rank, 60'000));
      for (const int64_t value : written) mistakes[static_cast<size_t>(rank)] += value != step ? 1 : 0;
      rank_barrier_cpu(ranks.params(rank, 60'000));
    }
  });
  for (size_t rank = 0; rank < mistakes.size(); ++rank) {
    EXPECT_EQ(mistakes[rank], 0);
    EXPECT_EQ(ranks.epochs[rank], 2 * kSteps);
    EXPECT_EQ(ranks.validities[rank], 1.0F);
    EXPECT_EQ(ranks.absent_ranks[rank], -1);
  }
}

TEST(RankBarrier, ARankThatDoesNotComeEndsEveryWait) {
  Ranks ranks;
  std::array<std::string, kRanks> errors;
  const auto begin = std::chrono::steady_clock::now();
  ranks.run([&](int64_t rank) {
    if (rank != 1) {
      errors[static_cast<size_t>(rank)] =
          error_of([&] { rank_barrier_cpu(ranks.params(rank, rank == 0 ? 100 : 600'000)); });
    }
  });
  EXPECT_EQ(errors[0], "rank 1 did not come within 100 ms, or gave up");
  EXPECT_EQ(errors[2], "rank 0 did not come within 600000 ms, or gave up");
  EXPECT_TRUE(std::isnan(ranks.validities[2]));
  // The rank comes at last, and the first one calls again: both learn at once.
  EXPECT_EQ(error_of([&] { rank_barrier_cpu(ranks.params(1, 600'000)); }),
            "rank 0 did not come within 600000 ms, or gave up");
  EXPECT_EQ(error_of([&] { rank_barrier_cpu(ranks.params(0, 600'000)); }),
            "rank 1 did not come within 600000 ms, or gave up");
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(60));
}

TEST(RankBarrierParams, AreChecked) {
  Ranks ranks;
  const auto error = [&](auto change) {
    RankBarrierParams params = ranks.params(0, 100);
    change(params);
    return error_of([&] { rank_barrier_cpu(params); });
  };
  EXPECT_EQ(error([](auto& params) { params.rank = 3; }), "rank must be between 0 and 2, got 3");
  EXPECT_EQ(error([](auto& params) { params.timeout_ms = 0; }), "timeout_ms must be at least 1, got 0");
  EXPECT_EQ(error([](auto& params) { params.signals.of_rank[1] = nullptr; }), "signals of rank 1 must not be null");
  EXPECT_EQ(error([](auto& params) { params.epoch = nullptr; }), "epoch must not be null");
  EXPECT_EQ(ranks.epochs[0], 0);
}

}  // namespace
}  // namespace zexpert
