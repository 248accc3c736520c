// SPDX-License-Identifier: Apache-2.0
// Which block of a grouped product computes what, and the ring of stages between its producer and its consumers,
// without a GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#include "cuda/grouped_mlp/layout.h"
#include "cuda/grouped_mlp/schedule.h"
#include "grouped_mlp_segments.h"

namespace zexpert::cuda {
namespace {

using testing::ascending;
using testing::row_tile_starts;

constexpr int kMaxRows = 160;

/// Uniform, Zipf, one expert takes all, none takes any, one row each, sizes around tile edges.
std::vector<std::vector<int>> segment_profiles(int num_experts, int mean, std::mt19937& random) {
  const auto experts = static_cast<size_t>(num_experts);
  std::vector<int> uniform(experts);
  std::vector<int> zipf(experts);
  std::vector<int> edges(experts);
  std::vector<int> all(experts);
  for (size_t e = 0; e < experts; ++e) {
    uniform[e] = static_cast<int>(random() % static_cast<unsigned>(2 * mean + 1));
    zipf[e] = mean * 4 / (static_cast<int>(e) + 1);
    const std::array<int, 12> around = {0, 1, 7, 8, 9, 63, 64, 65, 159, 160, 161, 321};
    edges[e] = around[random() % around.size()];
  }
  std::shuffle(zipf.begin(), zipf.end(), random);
  all[experts / 2] = mean * num_experts;
  return {uniform, zipf, edges, all, std::vector<int>(experts), std::vector<int>(experts, 1)};
}

TEST(GroupedMlpSchedule, SegmentsAreCutIntoFewEqualTiles) {
  for (int max_rows = kRowStep; max_rows <= 2 * kMaxRows; max_rows += kRowStep) {
    for (int rows = 0; rows <= 2000; ++rows) {
      const SegmentTiles tiles = split_segment(rows, max_rows);
      ASSERT_EQ(tiles.rows_per_tile % kRowStep, 0);
      ASSERT_LE(tiles.rows_per_tile, max_rows);
      ASSERT_LE(tiles.num_tiles, (rows + max_rows - 1) / max_rows);
      ASSERT_GE(tiles.num_tiles * tiles.rows_per_tile, rows);
      if (rows > 0) {
        // Schedule::whole_tile knows the number of tiles alone.
        ASSERT_EQ(tiles.rows_per_tile, round_up((rows + tiles.num_tiles - 1) / tiles.num_tiles, kRowStep));
      }
      ASSERT_LT((tiles.num_tiles - 1) * tiles.rows_per_tile, std::max(rows, 1)) << rows << " " << max_rows;
    }
  }
  EXPECT_EQ(split_segment(257, 160).num_tiles, 2);
  EXPECT_EQ(split_segment(257, 160).rows_per_tile, 136);
}

TEST(GroupedMlpSchedule, WarpgroupsShareATilesRows) {
  for (int rows = 1; rows <= 2 * kMaxRows; ++rows) {
    const PartRows all = rows_of_part(rows, 0, 1);
    ASSERT_EQ(all.num_rows, rows);
    ASSERT_EQ(all.num_columns, round_up(rows, kRowStep));
    const PartRows first = rows_of_part(rows, 0, 2);
    const PartRows second = rows_of_part(rows, 1, 2);
    ASSERT_EQ(first.first_row, 0);
    ASSERT_EQ(first.num_rows + second.num_rows, rows);
    ASSERT_EQ(second.first_row, first.num_columns);
    for (const PartRows& part : {first, second}) {
      ASSERT_EQ(part.num_columns, std::max(round_up(part.num_rows, kRowStep), kRowStep));
      ASSERT_LE(part.num_columns, kMaxRows);
    }
    // Only a warpgroup without rows multiplies lines that no row was brought to.
    if (second.num_rows > 0) {
      ASSERT_EQ(second.first_row + second.num_columns, all.num_columns);
    }
  }
}

/// Every element of every product is computed exactly once, over its whole depth, and blocks have equal shares where
/// steps are divided.
TEST(GroupedMlpSchedule, EveryTileOnce) {
  std::mt19937 random(1);
  for (const auto& [num_experts, weight_tiles, steps, mean] : {std::tuple{512, 16, 96, 4},
                                                               {256, 12, 16, 40},
                                                               {128, 6, 32, 170},
                                                               {5, 24, 32, 900},
                                                               {1, 1, 1, 5},
                                                               {3, 1, 7, 1}}) {
    for (const std::vector<int>& segments : segment_profiles(num_experts, mean, random)) {
      for (const int max_rows : {8, 64, 160, 288}) {
        const std::vector<int> offsets = ascending(segments);
        const std::vector<int> starts = row_tile_starts(segments, max_rows);
        for (const auto& [blocks, rounds] : {std::pair{7, 1}, {7, 8}, {132, 1}, {132, 8}, {132, 100000}}) {
          const Schedule schedule{offsets.data(), starts.data(), num_experts, weight_tiles, steps, blocks, rounds};
          const bool divided = schedule.num_tiles() < rounds * blocks;
          std::vector<int> steps_done(static_cast<size_t>(offsets.back() * weight_tiles));
          std::map<int, std::vector<int>> parts_of_tile;  // by first_block: a block begins one divided tile at most
          std::vector<int> steps_of_block;
          int num_tickets = 0;
          const auto take_ticket = [&] { return num_tickets++; };
          for (int block = 0; block < blocks; ++block) {
            int num_steps = 0;
            int num_parts = 0;
            std::vector<WorkItem> items;
            for_each_item(schedule, block, take_ticket, [&](const WorkItem& work) { items.push_back(work); });
            for (const WorkItem& work : items) {
              const auto expert = static_cast<size_t>(work.expert);
              ASSERT_GE(work.num_rows, 1);
              ASSERT_LE(work.num_rows, max_rows);
              ASSERT_GE(work.first_row, offsets[expert]);
              ASSERT_LE(work.first_row + work.num_rows, offsets[expert + 1]);
              ASSERT_LT(work.weight_tile, weight_tiles);
              ASSERT_LT(work.first_step, work.last_step);
              ASSERT_LE(work.last_step, steps);
              num_steps += work.last_step - work.first_step;
              ASSERT_EQ(work.num_parts > 1, work.last_step - work.first_step < steps);
              if (work.num_parts > 1) {
                ASSERT_TRUE(divided);
                ASSERT_EQ(work.first_block + work.part, block);
                ASSERT_EQ(work.part == 0, work.first_step == 0);
                ASSERT_EQ(work.part == work.num_parts - 1, work.last_step == steps);
                ASSERT_LE(++num_parts, 2);
                std::vector<int>& seen = parts_of_tile[work.first_block];
                ASSERT_EQ(static_cast<int>(seen.size()), work.part);
                seen.push_back(work.num_parts);
              }
              for (int row = work.first_row; row < work.first_row + work.num_rows; ++row) {
                steps_done[static_cast<size_t>(row * weight_tiles + work.weight_tile)] +=
                    work.last_step - work.first_step;
              }
            }
            if (divided && num_steps > 0)
              steps_of_block.push_back(num_steps);
          }
          ASSERT_TRUE(
              std::all_of(steps_done.begin(), steps_done.end(), [&, all = steps](int done) { return done == all; }));
          for (const auto& [first_block, seen] : parts_of_tile) {
            ASSERT_EQ(seen, std::vector<int>(seen.size(), static_cast<int>(seen.size())));
          }
          if (!steps_of_block.empty()) {
            const auto [least, most] = std::minmax_element(steps_of_block.begin(), steps_of_block.end());
            ASSERT_LE(*most - *least, 1);
            ASSERT_GE(*least, std::min(kLeastStepsOfPart, steps * schedule.num_tiles()));
          }
        }
      }
    }
  }
}

// ---- The ring of stages ---------------------------------------------------------------------------------------------

/// An mbarrier: a phase ends when its arrivals and bytes have come.
struct Barrier {
  explicit Barrier(int num_arrivals) : expected(num_arrivals), pending(num_arrivals) {}

  void arrive(int bytes_to_come = 0) {
    ASSERT_GT(pending, 0) << "more arrivals than the phase expects";
    --pending;
    bytes += bytes_to_come;
    end_phase();
  }
  void complete(int num_bytes) {
    bytes -= num_bytes;
    end_phase();
  }
  bool is_over(uint32_t parity) const { return (phase & 1U) != parity; }

  int expected;
  int pending;
  int bytes = 0;
  uint32_t phase = 0;

 private:
  void end_phase() {
    if (pending == 0 && bytes == 0) {
      ++phase;
      pending = expected;
    }
  }
};

/// Producer, copies and consumer warps of a block, one action of a random one at a time: every warp finds every step's
/// data in its stage and every item, and nobody waits for ever. As load_tiles and compute_tiles.
void run_ring(const std::vector<int>& steps_of_items, std::mt19937& random) {
  constexpr int kStages = 3;
  constexpr int kParts = 3;  // two halves of the weights, and the rows
  constexpr int kItemPlaces = 2;
  constexpr int kNoMoreWork = -1;
  struct Warp {
    RingPosition<kStages> ring;
    RingPosition<kItemPlaces> place;
    bool has_item = false;
    int item = 0;
    int step = 0;
    int steps_read = 0;
    int previous_stage = -1;
    bool finished = false;
  };
  struct Copy {
    int stage;
    int part;
    int step;
  };
  std::vector<Barrier> full(kStages, Barrier(1));
  std::array<Warp, 8> warps;
  std::vector<Barrier> empty(kStages, Barrier(static_cast<int>(warps.size())));
  std::array<std::array<int, kParts>, kStages> content{};  // the step whose data lies there, counted from 1
  std::vector<Barrier> item_full(kItemPlaces, Barrier(1));
  std::vector<Barrier> item_empty(kItemPlaces, Barrier(static_cast<int>(warps.size())));
  std::array<int, kItemPlaces> items{};
  std::vector<Copy> copies;
  RingPosition<kStages> ring;  // the producer's, which asks for step `step` of item `item`
  RingPosition<kItemPlaces> place;
  bool handed_over = false;
  const auto num_items = static_cast<int>(steps_of_items.size());
  int item = 0;
  int step = 0;
  int steps_asked = 0;

  const auto produce = [&] {
    if (!handed_over) {
      const auto at = static_cast<size_t>(place.stage);
      if (item > num_items || !item_empty[at].is_over(place.parity ^ 1U))
        return false;
      items[at] = item < num_items ? item : kNoMoreWork;
      item_full[at].arrive();
      place.advance();
      handed_over = item < num_items;
      item += handed_over ? 0 : 1;
      return true;
    }
    const auto stage = static_cast<size_t>(ring.stage);
    if (!empty[stage].is_over(ring.parity ^ 1U))
      return false;
    full[stage].arrive(kParts);
    ++steps_asked;
    for (int part = 0; part < kParts; ++part) copies.push_back({ring.stage, part, steps_asked});
    ring.advance();
    if (++step == steps_of_items[static_cast<size_t>(item)]) {
      step = 0;
      ++item;
      handed_over = false;
    }
    return true;
  };
  const auto copy = [&] {
    if (copies.empty())
      return false;
    std::swap(copies[random() % copies.size()], copies.back());
    const Copy done = copies.back();
    copies.pop_back();
    content[static_cast<size_t>(done.stage)][static_cast<size_t>(done.part)] = done.step;
    full[static_cast<size_t>(done.stage)].complete(1);
    return true;
  };
  const auto consume = [&](Warp& warp) {
    if (!warp.has_item) {
      const auto at = static_cast<size_t>(warp.place.stage);
      if (warp.finished || !item_full[at].is_over(warp.place.parity))
        return false;
      EXPECT_EQ(items[at], warp.item < num_items ? warp.item : kNoMoreWork);
      warp.finished = items[at] == kNoMoreWork;
      warp.has_item = !warp.finished;
      item_empty[at].arrive();
      warp.place.advance();
      return true;
    }
    const auto stage = static_cast<size_t>(warp.ring.stage);
    if (!full[stage].is_over(warp.ring.parity))
      return false;
    // The step before is done with only now: its stage, too, must still hold what it held.
    ++warp.steps_read;
    for (const int part : content[stage]) EXPECT_EQ(part, warp.steps_read);
    if (warp.step > 0) {
      for (const int part : content[static_cast<size_t>(warp.previous_stage)]) EXPECT_EQ(part, warp.steps_read - 1);
      empty[static_cast<size_t>(warp.previous_stage)].arrive();
    }
    warp.previous_stage = warp.ring.stage;
    warp.ring.advance();
    if (++warp.step == steps_of_items[static_cast<size_t>(warp.item)]) {
      empty[static_cast<size_t>(warp.previous_stage)].arrive();
      warp.step = 0;
      warp.has_item = false;
      ++warp.item;
    }
    return true;
  };

  const int total = std::accumulate(steps_of_items.begin(), steps_of_items.end(), 0);
  int idle = 0;
  while (idle < 100000 && !::testing::Test::HasFailure()) {
    const auto actor = random() % 12;
    const bool acted = actor == 0 ? produce() : actor < 4 ? copy() : consume(warps[actor - 4]);
    if (std::all_of(warps.begin(), warps.end(), [](const Warp& warp) { return warp.finished; })) {
      EXPECT_EQ(warps[0].steps_read, total);
      return;
    }
    idle = acted ? 0 : idle + 1;
  }
  FAIL() << "all wait, or a check failed";
}

/// Segments of scales begin where the copy engine may read, do not overlap, and fit.
TEST(GroupedMlpScales, SegmentsAreAligned) {
  std::mt19937 random(7);
  for (const int num_experts : {1, 2, 24, 513}) {
    for (const std::vector<int>& segments : segment_profiles(num_experts, 5, random)) {
      const std::vector<int> offsets = ascending(segments);
      int64_t end = 0;
      for (int expert = 0; expert < num_experts; ++expert) {
        const auto e = static_cast<size_t>(expert);
        const int begin = first_scale(offsets[e], expert);
        EXPECT_EQ(begin * static_cast<int>(sizeof(float)) % 16, 0);
        EXPECT_GE(begin, end);
        end = begin + segments[e];
      }
      EXPECT_LE(end, padded_scale_rows(offsets.back(), num_experts));
    }
  }
}

/// A tile's scales begin in its expert's segment where its rows do.
TEST(GroupedMlpScales, TilesFindTheirs) {
  const std::vector<int> segments = {3, 0, 200, 137, 1};
  const std::vector<int> offsets = ascending(segments);
  const std::vector<int> starts = row_tile_starts(segments, kMaxRows);
  const Schedule schedule{offsets.data(), starts.data(), 5, 2, 4, 7, 2};
  for (int tile = 0; tile < schedule.num_tiles(); ++tile) {
    const WorkItem work = schedule.whole_tile(tile);
    const int begin = offsets[static_cast<size_t>(work.expert)];
    EXPECT_EQ(work.first_scale - first_scale(begin, work.expert), work.first_row - begin);
  }
}

TEST(GroupedMlpRing, EveryStepReachesEveryWarp) {
  std::mt19937 random(5);
  for (int repeat = 0; repeat < 40; ++repeat) {
    std::vector<int> steps_of_items;
    for (int i = 0; i < repeat; ++i) steps_of_items.push_back(1 + static_cast<int>(random() % 9));
    run_ring(steps_of_items, random);
  }
}

}  // namespace
}  // namespace zexpert::cuda
