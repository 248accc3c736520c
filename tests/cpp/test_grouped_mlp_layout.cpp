// SPDX-License-Identifier: Apache-2.0
// grouped_mlp's products on a Hopper GPU, without a GPU: what its kernels use of grouped_mlp/layout.h, run against
// models of the hardware that follow the PTX ISA: the copy engine's boxes and swizzle, the matrix instruction's
// operands in shared memory and sums in registers, the transposing store.
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include "cuda/grouped_mlp/layout.h"
#include "cuda/grouped_mlp/schedule.h"
#include "grouped_mlp_segments.h"
#include "zexpert/grouped_mlp.h"

namespace zexpert::cuda {
namespace {

using testing::ascending;
using testing::row_tile_starts;

constexpr int kDepthOfInstruction = kInstructionBytes / kElementBytes;
constexpr int kMaxRows = kHopperMaxTileRows;

TEST(GroupedMlpLayout, RowBoxesFillATile) {
  for (int columns = kRowStep; columns <= kMaxRows; columns += kRowStep) {
    int lines = 0;
    for_each_row_box(columns, [&](int box, int line) {
      EXPECT_EQ(line, lines);
      EXPECT_EQ(line * kLineBytes % kSwizzleBytes, 0);
      lines += kRowStep << box;
    });
    EXPECT_EQ(lines, columns);
  }
}

/// The four matrices fill their place, each unit once, and of 8 lanes that access the banks together each uses others.
template <Product kProduct>
void expect_no_bank_conflicts() {
  using Turn = OutputTurn<kProduct>;
  for (const auto& offset_of : {&Turn::store_offset, &Turn::load_offset}) {
    std::vector<int> used(kStagingBytes / 16);
    for (int first_lane = 0; first_lane < 32; first_lane += 8) {
      uint32_t banks = 0;
      for (int lane = first_lane; lane < first_lane + 8; ++lane) {
        const uint32_t offset = offset_of(lane);
        ASSERT_EQ(offset % 16, 0U);
        ASSERT_LT(offset, static_cast<uint32_t>(kStagingBytes));
        ++used[offset / 16];
        banks |= 1U << (offset / 16 % 8);
      }
      EXPECT_EQ(banks, 0xffU);
    }
    EXPECT_EQ(used, std::vector<int>(used.size(), 1));
  }
}
TEST(GroupedMlpLayout, StagingHasNoBankConflicts) {
  expect_no_bank_conflicts<Product::kGateUp>();
  expect_no_bank_conflicts<Product::kDown>();
}

// ---- Models of the hardware. Elements are numbers; addresses count bytes, 2 of them an element.
// ----------------------

using Elements = std::vector<float>;

/// 128-byte swizzle by the bits of the address: bits 4 to 6 are exchanged by bits 7 to 9.
uint32_t swizzle_of_address(uint32_t address) { return address ^ (((address >> 7) & 7U) << 4); }

/// Writes a box of `tensor` to shared memory, innermost dimension first, 0 for what lies outside; returns its bytes.
uint32_t copy_box(const TensorMapShape& map, const Elements& tensor, const std::vector<int>& coordinates,
                  Elements& memory, uint32_t destination) {
  EXPECT_EQ(coordinates.size(), map.rank);
  EXPECT_EQ(map.box[0] * kElementBytes, 128U);
  uint32_t num_elements = 1;
  for (uint32_t dim = 0; dim < map.rank; ++dim) {
    EXPECT_LE(map.box[dim], 256U);
    EXPECT_GT(map.box[dim], 0U);
    EXPECT_GT(map.sizes[dim], 0U);
    EXPECT_EQ(dim == 0 ? 0 : map.strides[dim] % 16, 0U);
    num_elements *= map.box[dim];
  }
  for (uint32_t i = 0; i < num_elements; ++i) {
    uint32_t rest = i;
    uint64_t source = 0;
    bool inside = true;
    for (uint32_t dim = 0; dim < map.rank; ++dim) {
      const int64_t at = coordinates[dim] + static_cast<int64_t>(rest % map.box[dim]);
      rest /= map.box[dim];
      inside = inside && at >= 0 && at < static_cast<int64_t>(map.sizes[dim]);
      source += inside ? static_cast<uint64_t>(at) * map.strides[dim] : 0;
    }
    const float value = inside ? tensor.at(source / kElementBytes) : 0.0F;
    memory.at(swizzle_of_address(destination + i * kElementBytes) / kElementBytes) = value;
  }
  return num_elements * kElementBytes;
}

/// Element [row, k] of an operand whose depth is contiguous, as its descriptor tells.
float operand(const Elements& memory, uint64_t descriptor, int row, int k) {
  EXPECT_EQ(descriptor >> 62, 1U) << "128-byte swizzle";
  const auto start = static_cast<uint32_t>((descriptor & 0x3fffU) << 4);
  const auto stride = static_cast<uint32_t>(((descriptor >> 32) & 0x3fffU) << 4);
  const uint32_t address = start + static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(row % 8) * 128 +
                           static_cast<uint32_t>(k) * kElementBytes;
  return memory.at(swizzle_of_address(address) / kElementBytes);
}

/// sums[thread][register] of a warpgroup.
using Sums = std::vector<std::vector<float>>;

void matrix_instruction(Sums& sums, int columns, const Elements& memory, uint64_t a, uint64_t b) {
  for (int thread = 0; thread < 128; ++thread) {
    const int warp = thread / 32;
    const int lane = thread % 32;
    for (int i = 0; i < columns / 2; ++i) {
      const int row = 16 * warp + lane / 4 + 8 * (i / 2 % 2);
      const int column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      float& sum = sums[static_cast<size_t>(thread)][static_cast<size_t>(i)];
      for (int k = 0; k < kDepthOfInstruction; ++k) sum += operand(memory, a, row, k) * operand(memory, b, column, k);
    }
  }
}

/// A warp's 32-bit registers, two elements each, of matrix m: registers[m][lane].
using Fragments = std::vector<std::array<std::pair<float, float>, 32>>;

/// Column c of matrix m becomes the 8 elements at addresses[8 * m + c].
void store_transposed(Elements& memory, const std::vector<uint32_t>& addresses, const Fragments& fragments) {
  for (size_t m = 0; m < fragments.size(); ++m) {
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const uint32_t row = lane / 4;
      const uint32_t column = 2 * (lane % 4);
      memory.at(addresses[8 * m + column] / kElementBytes + row) = fragments[m][lane].first;
      memory.at(addresses[8 * m + column + 1] / kElementBytes + row) = fragments[m][lane].second;
    }
  }
}

// ---- The kernel's steps on these models -----------------------------------------------------------------------------

float activation_of(float gate, float up) { return gate / (1 + std::exp(-gate)) * up; }

struct Output {
  Elements values;
  std::vector<int> writes;
};

/// As write_rows.
template <Product kProduct>
void write_rows(const Sums (&sums)[kHalves], int warp, int columns, int num_rows, int first_row, int channel,
                int num_channels, Output& out) {
  using Turn = OutputTurn<kProduct>;
  for (int turn = 0; turn * Turn::kRows < columns; ++turn) {
    Elements staging(kStagingBytes / kElementBytes, NAN);
    Fragments fragments(4);
    std::vector<uint32_t> addresses;
    for (int lane = 0; lane < 32; ++lane) {
      const auto i = static_cast<size_t>(lane);
      addresses.push_back(Turn::store_offset(lane));
      for (size_t group = 0; group < Turn::kRows / 8; ++group) {
        const size_t s = 4 * (static_cast<size_t>(turn) * (Turn::kRows / 8) + group);
        if (s >= static_cast<size_t>(columns / 2))
          continue;
        for (size_t half = 0; half < kHalves; ++half) {
          const float* x = &sums[half][static_cast<size_t>(warp * 32 + lane)][s];
          if (kProduct == Product::kGateUp) {
            fragments[2 * group + half][i] = {activation_of(x[0], x[2]), activation_of(x[1], x[3])};
          } else {
            fragments[2 * half][i] = {x[0], x[1]};
            fragments[2 * half + 1][i] = {x[2], x[3]};
          }
        }
      }
    }
    store_transposed(staging, addresses, fragments);
    for (int lane = 0; lane < 32; ++lane) {
      const int row = turn * Turn::kRows + Turn::row(lane);
      if (row >= num_rows)
        continue;
      for (int i = 0; i < 8; ++i) {
        const auto to = static_cast<size_t>((first_row + row) * num_channels + channel + Turn::channel(lane) + i);
        out.values.at(to) = staging.at(Turn::load_offset(lane) / kElementBytes + static_cast<size_t>(i));
        ++out.writes.at(to);
      }
    }
  }
}

/// The kernel's work on [rows, depth] and weights [experts, matrices, channels, depth], one item after another.
template <Product kProduct, Tiles kTiles>
Output grouped_product(const Elements& rows, int num_rows, int depth, const Elements& weights, int num_channels,
                       const std::vector<int>& segments, int max_rows, int num_blocks) {
  constexpr int kWeightBytes = weight_bytes(kTiles);
  constexpr int kStepDepth = step_depth(kElementBytes);
  constexpr int kRounds = 2;  // fewer rounds of tiles than this have their steps divided
  const std::vector<int> offsets = ascending(segments);
  const std::vector<int> starts = row_tile_starts(segments, max_rows);
  const auto num_experts = static_cast<int>(segments.size());
  const int weight_tiles = (num_channels + tile_channels(kProduct, kTiles) - 1) / tile_channels(kProduct, kTiles);
  const Schedule schedule{offsets.data(),     starts.data(), num_experts, weight_tiles,
                          depth / kStepDepth, num_blocks,    kRounds};
  const TensorMapShape weights_shape =
      weights_map(kProduct, kTiles, num_channels, depth, num_experts,
                  int64_t{num_matrices(kProduct)} * num_channels * depth, kElementBytes);
  Output out{Elements(static_cast<size_t>(num_rows * num_channels), NAN),
             std::vector<int>(static_cast<size_t>(num_rows * num_channels))};
  std::map<int, std::array<std::vector<Sums>, kWarpgroups>> parts;  // of divided tiles: [warpgroup][half]
  std::vector<WorkItem> items;
  int num_tickets = 0;
  const auto take_ticket = [&] { return num_tickets++; };
  for (int block = 0; block < num_blocks; ++block)
    for_each_item(schedule, block, take_ticket, [&](const WorkItem& work) { items.push_back(work); });
  for (const WorkItem& work : items) {
    const int num_lines = round_up(work.num_rows, kRowStep);
    std::array<PartRows, kWarpgroups> own_rows{};
    std::array<std::vector<Sums>, kWarpgroups> sums;
    for (size_t w = 0; w < kWarpgroups; ++w) {
      own_rows[w] = rows_of_part(work.num_rows, static_cast<int>(w) / weight_parts(kTiles), row_parts(kTiles));
      const auto num_sums = static_cast<size_t>(own_rows[w].num_columns / 2);
      sums[w] = std::vector<Sums>(kHalves, Sums(128, std::vector<float>(num_sums)));
    }
    for (int step = work.first_step; step < work.last_step; ++step) {
      constexpr uint32_t kStage = 3 * kSwizzleBytes;  // any multiple
      Elements memory((kStage + kWeightBytes + kMaxRows * kLineBytes) / kElementBytes, NAN);
      uint32_t bytes = 0;
      for (int half = 0; half < kHalves; ++half) {
        const WeightBox box = weight_box(kProduct, kTiles, work.expert, work.weight_tile, half, step * kStepDepth);
        bytes += copy_box(weights_shape, weights, {box.coordinates, box.coordinates + 5}, memory,
                          kStage + static_cast<uint32_t>(half * half_bytes(kTiles)));
      }
      for_each_row_box(num_lines, [&](int box, int line) {
        bytes += copy_box(rows_map(num_rows, depth, depth, box, kElementBytes), rows,
                          {step * kStepDepth, work.first_row + line}, memory,
                          kStage + static_cast<uint32_t>(kWeightBytes + line * kLineBytes));
      });
      EXPECT_EQ(bytes, static_cast<uint32_t>(kWeightBytes + num_lines * kLineBytes)) << "what the barrier expects";
      for (size_t warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup) {
        const auto first_weight = static_cast<int>(warpgroup) % weight_parts(kTiles) * kInstructionRows;
        const uint32_t own = kStage + static_cast<uint32_t>(first_weight * kLineBytes);
        const uint32_t first =
            kStage + static_cast<uint32_t>(kWeightBytes + own_rows[warpgroup].first_row * kLineBytes);
        for (size_t half = 0; half < kHalves; ++half) {
          for (uint64_t k = 0; k < kInstructionsPerStep; ++k) {
            matrix_instruction(
                sums[warpgroup][half], own_rows[warpgroup].num_columns, memory,
                matrix_descriptor(own + static_cast<uint32_t>(half * half_bytes(kTiles))) + k * kDescriptorStep,
                matrix_descriptor(first) + k * kDescriptorStep);
          }
        }
      }
    }
    if (work.num_parts > 1) {
      auto& total = parts[work.first_block];
      for (size_t w = 0; w < kWarpgroups; ++w) {
        if (work.part == 0) {
          total[w] = sums[w];
          continue;
        }
        for (size_t h = 0; h < kHalves; ++h) {
          for (size_t t = 0; t < 128; ++t) {
            for (size_t k = 0; k < sums[w][h][t].size(); ++k) total[w][h][t][k] += sums[w][h][t][k];
          }
        }
      }
      if (work.part < work.num_parts - 1)
        continue;
      sums = total;
    }
    for (int warpgroup = 0; warpgroup < kWarpgroups; ++warpgroup) {
      const std::vector<Sums>& own = sums[static_cast<size_t>(warpgroup)];
      const PartRows& part = own_rows[static_cast<size_t>(warpgroup)];
      for (int warp = 0; warp < kWarpsPerWarpgroup; ++warp) {
        const int channel = first_channel(kProduct, kTiles, work.weight_tile, warpgroup, warp);
        if (channel < num_channels) {
          const Sums halves[kHalves] = {own[0], own[1]};
          write_rows<kProduct>(halves, warp, part.num_columns, part.num_rows, work.first_row + part.first_row, channel,
                               num_channels, out);
        }
      }
    }
  }
  return out;
}

/// Small whole numbers, so that every order of additions gives the same sum.
Elements whole_numbers(int size, std::mt19937& random) {
  Elements values(static_cast<size_t>(size));
  for (float& value : values) value = static_cast<float>(static_cast<int>(random() % 7) - 3);
  return values;
}

template <Product kProduct>
void expect_product(int num_channels, int depth, const std::vector<int>& segments, int max_rows, int num_blocks) {
  std::mt19937 random(7);
  const auto num_experts = static_cast<int>(segments.size());
  const std::vector<int> offsets = ascending(segments);
  const int num_rows = offsets.back() + 3;  // some do no work
  const Elements rows = whole_numbers(num_rows * depth, random);
  const Elements weights = whole_numbers(num_experts * num_matrices(kProduct) * num_channels * depth, random);
  const auto multiply = max_rows <= kHopperTallTileRows ? &grouped_product<kProduct, Tiles::kTall>
                                                        : &grouped_product<kProduct, Tiles::kWide>;
  const Output out = multiply(rows, num_rows, depth, weights, num_channels, segments, max_rows, num_blocks);

  const auto product = [&](int expert, int matrix, int channel, int row) {
    float sum = 0;
    const int weight_row = (expert * num_matrices(kProduct) + matrix) * num_channels + channel;
    for (int k = 0; k < depth; ++k) {
      sum += rows[static_cast<size_t>(row * depth + k)] * weights[static_cast<size_t>(weight_row * depth + k)];
    }
    return sum;
  };
  for (int expert = 0; expert < num_experts; ++expert) {
    for (int row = offsets[static_cast<size_t>(expert)]; row < offsets[static_cast<size_t>(expert) + 1]; ++row) {
      for (int channel = 0; channel < num_channels; ++channel) {
        const auto at = static_cast<size_t>(row * num_channels + channel);
        ASSERT_EQ(out.writes[at], 1) << "row " << row << ", channel " << channel;
        const float expected = kProduct == Product::kGateUp
                                   ? activation_of(product(expert, 0, channel, row), product(expert, 1, channel, row))
                                   : product(expert, 0, channel, row);
        ASSERT_EQ(out.values[at], expected) << "row " << row << ", channel " << channel;
      }
    }
  }
  for (size_t at = static_cast<size_t>(offsets.back() * num_channels); at < out.writes.size(); ++at) {
    ASSERT_EQ(out.writes[at], 0) << "past the last segment";
  }
}

struct Case {
  std::vector<int> segments;
  int num_channels;
  int depth;
  int max_rows;
  int num_blocks;
};

class GroupedMlpProduct : public ::testing::TestWithParam<Case> {};

TEST_P(GroupedMlpProduct, GateUp) {
  const Case& c = GetParam();
  expect_product<Product::kGateUp>(c.num_channels, c.depth, c.segments, c.max_rows, c.num_blocks);
}

TEST_P(GroupedMlpProduct, Down) {
  const Case& c = GetParam();
  expect_product<Product::kDown>(c.num_channels, c.depth, c.segments, c.max_rows, c.num_blocks);
}

// Sizes that fill no tile, one, and one and a part; tiles of few and of many rows, tall and wide; tiles whose depth is
// divided.
INSTANTIATE_TEST_SUITE_P(Cases, GroupedMlpProduct,
                         ::testing::Values(Case{{3, 0, 9, 1}, 64, 64, 64, 1}, Case{{17, 30}, 128, 64, 24, 132},
                                           Case{{5, 0, 0, 12}, 192, 512, 64, 132}, Case{{165}, 320, 64, 160, 3},
                                           Case{{0, 137, 8}, 256, 128, 160, 5}, Case{{1}, 64, 1024, 64, 132},
                                           Case{{0, 257, 3, 20}, 192, 128, 288, 7}, Case{{295}, 64, 512, 288, 132}));

}  // namespace
}  // namespace zexpert::cuda
