// SPDX-License-Identifier: Apache-2.0
#include "zexpert/parallel.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <mutex>
#include <utility>
#include <vector>

namespace zexpert {
namespace {

using Range = std::pair<int64_t, int64_t>;

std::vector<Range> ranges_of(int64_t begin, int64_t end, int64_t grain_size) {
  std::mutex mutex;
  std::vector<Range> ranges;
  parallel_for(begin, end, grain_size, [&](int64_t range_begin, int64_t range_end) {
    const std::lock_guard<std::mutex> lock(mutex);
    ranges.emplace_back(range_begin, range_end);
  });
  std::sort(ranges.begin(), ranges.end());
  return ranges;
}

TEST(ParallelFor, RangesCoverAllAndKeepTheGrainSize) {
  for (const int64_t begin : {int64_t{0}, int64_t{-5}, int64_t{1} << 40}) {
    for (const int64_t count : {1, 2, 3, 7, 100, 1001}) {
      for (const int64_t grain_size : {-1, 0, 1, 2, 50, 5000}) {
        const std::vector<Range> ranges = ranges_of(begin, begin + count, grain_size);
        ASSERT_FALSE(ranges.empty());
        EXPECT_EQ(ranges.front().first, begin);
        EXPECT_EQ(ranges.back().second, begin + count);
        for (size_t i = 0; i + 1 < ranges.size(); ++i) {
          EXPECT_EQ(ranges[i].second, ranges[i + 1].first);
          EXPECT_GE(ranges[i].second - ranges[i].first, std::max<int64_t>(grain_size, 1));
        }
        EXPECT_GT(ranges.back().second, ranges.back().first);
      }
    }
  }
}

TEST(ParallelFor, FewIterationsStayTogether) {
  EXPECT_EQ(ranges_of(3, 10, 7), (std::vector<Range>{{3, 10}}));
  EXPECT_EQ(ranges_of(3, 10, 100), (std::vector<Range>{{3, 10}}));
}

TEST(ParallelFor, AnEmptyRangeCallsNothing) {
  EXPECT_TRUE(ranges_of(4, 4, 1).empty());
  EXPECT_TRUE(ranges_of(4, 3, 1).empty());
}

TEST(ParallelFor, NestedCallsCoverAll) {
  std::vector<int> visits(64);
  parallel_for(0, 8, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      parallel_for(0, 8, 1, [&](int64_t inner_begin, int64_t inner_end) {
        for (int64_t j = inner_begin; j < inner_end; ++j) ++visits[static_cast<size_t>(i * 8 + j)];
      });
    }
  });
  EXPECT_EQ(visits, std::vector<int>(64, 1));
}

TEST(ParallelFor, AnInstalledPoolReplacesTheDefault) {
  static int calls = 0;
  set_parallel_for([](int64_t begin, int64_t end, int64_t grain_size, ParallelBody body, void* context) {
    ++calls;
    EXPECT_EQ(grain_size, 3);
    for (int64_t i = begin; i < end; ++i) body(i, i + 1, context);
  });
  EXPECT_EQ(ranges_of(0, 3, 3), (std::vector<Range>{{0, 1}, {1, 2}, {2, 3}}));
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(ranges_of(5, 5, 3).empty());
  EXPECT_EQ(calls, 1) << "an empty range reaches no pool";

  set_parallel_for(nullptr);
  EXPECT_EQ(ranges_of(0, 3, 3), (std::vector<Range>{{0, 3}}));
  EXPECT_EQ(calls, 1) << "null restores the default";
}

}  // namespace
}  // namespace zexpert
