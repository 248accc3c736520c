// SPDX-License-Identifier: Apache-2.0
// router_logits' kernels for Hopper without a GPU: models of the copy engine, the matrix instruction and the barriers
// run on the kernels' own index arithmetic.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <set>
#include <utility>
#include <vector>

#include "cuda/grouped_mlp/layout.h"
#include "cuda/router_logits_layout.h"

namespace zexpert::cuda::router {
namespace {

/// What the copy engine's 128-byte swizzle makes of the byte at `offset` of shared memory.
uint32_t swizzled(uint32_t offset) { return offset ^ (offset / 128 % 8 * 16); }

/// Copies a box of lines of 128 bytes from a matrix of `rows` by `columns` elements, zeros past its edges.
template <typename T>
void load_box(std::vector<uint8_t>& memory, uint32_t to, const std::vector<T>& matrix, int rows, int columns,
              int first_column, int first_row, int num_lines) {
  constexpr int kLine = kLineBytes / static_cast<int>(sizeof(T));
  for (int line = 0; line < num_lines; ++line) {
    for (int c = 0; c < kLine; ++c) {
      const int row = first_row + line;
      const int column = first_column + c;
      const T value = row < rows && column < columns ? matrix[static_cast<size_t>(row * columns + column)] : T{};
      const auto offset = static_cast<uint32_t>(line * kLineBytes + c * static_cast<int>(sizeof(T)));
      std::memcpy(&memory[swizzled(to + offset)], &value, sizeof(T));
    }
  }
}

/// The matrix instruction's reading of element (row, depth) of an operand of 16-bit elements that `descriptor` names.
uint16_t operand_element(const std::vector<uint8_t>& memory, uint64_t descriptor, int row, int depth) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fffU) << 4U;
  const auto stride = static_cast<uint32_t>(descriptor >> 32U & 0x3fffU) << 4U;
  EXPECT_EQ(descriptor >> 62U, 1U);  // the 128-byte swizzle, which goes by the address's bits
  const uint32_t address =
      start + static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(row % 8 * kLineBytes + depth * 2);
  uint16_t value = 0;
  std::memcpy(&value, &memory[swizzled(address)], sizeof(value));
  return value;
}

/// One tile through load, fragments and instructions, as multiply_few() walks it. Weights and hidden states are small
/// integers, so that every sum is exact. Hidden states stand for themselves as uint16_t.
std::vector<int> tile_product(const std::vector<float>& weight, const std::vector<uint16_t>& hidden_states,
                              int num_experts, int num_tokens, int depth, int tile_experts, int columns) {
  const uint32_t half_bytes = static_cast<uint32_t>(tile_experts * kLineBytes);
  const uint32_t weight_bytes = kWeightHalves * half_bytes;
  constexpr uint32_t kBase = 3 * kSwizzleBytes;  // a stage begins anywhere at a period of the swizzle
  std::vector<uint8_t> memory(kBase + weight_bytes + static_cast<uint32_t>(columns * kLineBytes));
  std::vector<int> out(static_cast<size_t>(num_tokens * num_experts), -1);
  for (int warpgroup = 0; warpgroup < tile_experts / kInstructionRows; ++warpgroup) {
    const int first_line = warpgroup * kInstructionRows;
    std::vector<int> sums(static_cast<size_t>(kInstructionRows * columns));  // by instruction row and column
    for (int step = 0; step < static_cast<int>(divide_up(depth, kStepDepth)); ++step) {
      for (int half = 0; half < kWeightHalves; ++half) {
        load_box(memory, kBase + static_cast<uint32_t>(half) * half_bytes, weight, num_experts, depth,
                 step * kStepDepth + half * kWeightLineDepth, 0, tile_experts);
      }
      load_box(memory, kBase + weight_bytes, hidden_states, num_tokens, depth, step * kStepDepth, 0, columns);
      for (int i = 0; i < kInstructionsPerStep; ++i) {
        std::array<std::array<float, kInstructionDepth>, kInstructionRows> a{};
        for (int warp = 0; warp < 4; ++warp) {
          for (int lane = 0; lane < 32; ++lane) {
            const uint32_t own =
                static_cast<uint32_t>((first_line + 16 * warp) * kLineBytes) + weight_offset(lane, 0, 0);
            for (int d = 0; d < 2; ++d) {
              const auto in_line = static_cast<uint32_t>((i % 2 * kInstructionDepth + 8 * d) * 4);
              const uint32_t address = kBase + static_cast<uint32_t>(i / 2) * half_bytes + (own ^ in_line);
              EXPECT_EQ(own ^ in_line, own - weight_offset(lane, 0, 0) + weight_offset(lane, i, d));
              for (int h = 0; h < 2; ++h) {
                std::array<float, 2> pair{};
                std::memcpy(pair.data(), &memory[address + static_cast<uint32_t>(h * kSwizzleBytes)], 8);
                // As the instruction wants it: WgmmaRegisters
                const auto row = static_cast<size_t>(16 * warp + 8 * h + lane / 4);
                const auto k = static_cast<size_t>(8 * d + 2 * (lane % 4));
                a[row][k] = pair[0];
                a[row][k + 1] = pair[1];
              }
            }
          }
        }
        const uint64_t b = matrix_descriptor(kBase + weight_bytes) + static_cast<uint64_t>(i) * kDescriptorStep;
        for (int row = 0; row < kInstructionRows; ++row) {
          for (int column = 0; column < columns; ++column) {
            for (int k = 0; k < kInstructionDepth; ++k) {
              sums[static_cast<size_t>(row * columns + column)] +=
                  static_cast<int>(a[static_cast<size_t>(row)][static_cast<size_t>(k)]) *
                  operand_element(memory, b, column, k);
            }
          }
        }
      }
    }
    for (int warp = 0; warp < 4; ++warp) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int j = 0; j < columns / 8; ++j) {
          for (int h = 0; h < 2; ++h) {
            for (int i = 0; i < 2; ++i) {
              const int expert = first_line + expert_of_sum(warp, lane, h);
              const int token = token_of_sum(lane, j, i);
              const int row = 16 * warp + 8 * h + lane / 4;
              const int column = 8 * j + 2 * (lane % 4) + i;
              if (expert < num_experts && token < num_tokens) {
                int& logit = out[static_cast<size_t>(token * num_experts + expert)];
                EXPECT_EQ(logit, -1);
                logit = sums[static_cast<size_t>(row * columns + column)];
              }
            }
          }
        }
      }
    }
  }
  return out;
}

TEST(RouterLogitsLayout, TilesMultiplyTheirOperands) {
  std::mt19937 random(1);
  for (const auto& [experts, tokens, depth, tile_experts, columns] :
       {std::array{64, 8, 64, 64, 8}, std::array{60, 13, 136, 64, 16}, std::array{128, 128, 128, 128, 128},
        std::array{101, 70, 72, 128, 128}}) {
    std::vector<float> weight(static_cast<size_t>(experts * depth));
    std::vector<uint16_t> hidden_states(static_cast<size_t>(tokens * depth));
    for (float& value : weight) value = static_cast<float>(random() % 50);
    for (uint16_t& value : hidden_states) value = static_cast<uint16_t>(random() % 50);
    const std::vector<int> out = tile_product(weight, hidden_states, experts, tokens, depth, tile_experts, columns);
    for (int t = 0; t < tokens; ++t) {
      for (int e = 0; e < experts; ++e) {
        int expected = 0;
        for (int k = 0; k < depth; ++k) {
          expected += static_cast<int>(weight[static_cast<size_t>(e * depth + k)]) *
                      hidden_states[static_cast<size_t>(t * depth + k)];
        }
        ASSERT_EQ(out[static_cast<size_t>(t * experts + e)], expected) << "token " << t << " expert " << e;
      }
    }
  }
}

/// The same as multiply_units() walks it: tokens are the instruction's rows. One part of the weights.
std::vector<int> tile_product_of_tokens(const std::vector<uint16_t>& weight, const std::vector<uint16_t>& hidden_states,
                                        int num_experts, int num_tokens, int depth) {
  constexpr uint32_t kBase = 2 * kSwizzleBytes;
  constexpr auto kWeightBytes = static_cast<uint32_t>(kManyExperts * kLineBytes);
  std::vector<uint8_t> memory(kBase + kWeightBytes + static_cast<uint32_t>(kManyTokens * kLineBytes));
  std::vector<int> sums(static_cast<size_t>(kManyTokens * kManyExperts));  // by row of all instructions and column
  for (int step = 0; step < static_cast<int>(divide_up(depth, kStepDepth)); ++step) {
    load_box(memory, kBase, weight, num_experts, depth, step * kStepDepth, 0, kManyExperts);
    load_box(memory, kBase + kWeightBytes, hidden_states, num_tokens, depth, step * kStepDepth, 0, kManyTokens);
    for (int i = 0; i < kInstructionsPerStep; ++i) {
      std::array<std::array<uint16_t, kInstructionDepth>, kManyTokens> a{};
      for (int warp = 0; warp < 4 * kManyWarpgroups; ++warp) {
        const uint32_t line = kBase + kWeightBytes + static_cast<uint32_t>(16 * warp * kLineBytes);
        for (int lane = 0; lane < 32; ++lane) {
          EXPECT_EQ(token_offset(lane, 0) ^ static_cast<uint32_t>(i * 32), token_offset(lane, i));
          for (int matrix = 0; matrix < 4; ++matrix) {  // lane l has row l / 4 and 2 elements of each matrix
            const uint32_t address =
                line + token_offset(8 * matrix + lane / 4, i) + static_cast<uint32_t>(lane % 4 * 4);
            std::array<uint16_t, 2> pair{};
            std::memcpy(pair.data(), &memory[address], 4);
            // As the instruction wants it: operand 2 * d + h
            const auto row = static_cast<size_t>(16 * warp + 8 * (matrix % 2) + lane / 4);
            const auto k = static_cast<size_t>(8 * (matrix / 2) + 2 * (lane % 4));
            a[row][k] = pair[0];
            a[row][k + 1] = pair[1];
          }
        }
      }
      const uint64_t b = matrix_descriptor(kBase) + static_cast<uint64_t>(i) * kDescriptorStep;
      for (int row = 0; row < kManyTokens; ++row) {
        for (int column = 0; column < kManyExperts; ++column) {
          for (int k = 0; k < kInstructionDepth; ++k) {
            sums[static_cast<size_t>(row * kManyExperts + column)] +=
                a[static_cast<size_t>(row)][static_cast<size_t>(k)] * operand_element(memory, b, column, k);
          }
        }
      }
    }
  }
  std::vector<int> out(static_cast<size_t>(num_tokens * num_experts), -1);
  for (int warp = 0; warp < 4 * kManyWarpgroups; ++warp) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int j = 0; j < kManyExperts / 8; ++j) {
        for (int h = 0; h < 2; ++h) {
          for (int i = 0; i < 2; ++i) {
            const int token = token_of_row(warp, lane, h);
            const int expert = expert_of_column(lane, j, i);
            if (expert < num_experts && token < num_tokens) {
              int& logit = out[static_cast<size_t>(token * num_experts + expert)];
              EXPECT_EQ(logit, -1);
              const int row = 16 * warp + 8 * h + lane / 4;
              logit = sums[static_cast<size_t>(row * kManyExperts + 8 * j + 2 * (lane % 4) + i)];
            }
          }
        }
      }
    }
  }
  return out;
}

TEST(RouterLogitsLayout, TilesOfManyTokensMultiplyTheirOperands) {
  std::mt19937 random(2);
  for (const auto& [experts, tokens, depth] : {std::array{128, 128, 128}, std::array{101, 70, 72}}) {
    std::vector<uint16_t> weight(static_cast<size_t>(experts * depth));
    std::vector<uint16_t> hidden_states(static_cast<size_t>(tokens * depth));
    for (uint16_t& value : weight) value = static_cast<uint16_t>(random() % 50);
    for (uint16_t& value : hidden_states) value = static_cast<uint16_t>(random() % 50);
    const std::vector<int> out = tile_product_of_tokens(weight, hidden_states, experts, tokens, depth);
    for (int t = 0; t < tokens; ++t) {
      for (int e = 0; e < experts; ++e) {
        int expected = 0;
        for (int k = 0; k < depth; ++k) {
          expected += weight[static_cast<size_t>(e * depth + k)] * hidden_states[static_cast<size_t>(t * depth + k)];
        }
        ASSERT_EQ(out[static_cast<size_t>(t * experts + e)], expected) << "token " << t << " expert " << e;
      }
    }
  }
}

float as_float(uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint32_t bits_of(float value) {
  uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

TEST(RouterLogitsLayout, ScalesBringTheLargestIntoFloat16sRange) {
  for (int exponent = -126; exponent <= 127; ++exponent) {
    for (const float factor : {1.0F, -1.5F, 1.9921875F}) {
      const float largest = std::ldexp(factor, exponent);
      const float token = as_float(token_scale(bits_of(largest)));
      const float weight = as_float(weight_scale(bits_of(std::fabs(largest))));
      EXPECT_EQ(token * as_float(inverse_scale(token_scale(bits_of(largest)))), 1.0F);
      EXPECT_EQ(weight * as_float(inverse_scale(weight_scale(bits_of(std::fabs(largest))))), 1.0F);
      EXPECT_LT(std::fabs(largest) * token, 32768.0F);
      EXPECT_LT(std::fabs(largest) * weight, 32768.0F);
      if (exponent >= -98)
        EXPECT_GE(std::fabs(largest) * token, 16384.0F) << exponent;
      else
        EXPECT_EQ(token, std::ldexp(1.0F, 112));
      if (exponent >= -13 && exponent < 3)
        EXPECT_EQ(weight, 4096.0F) << exponent;
      else if (exponent >= -112)
        EXPECT_GE(std::fabs(largest) * weight, 16384.0F) << exponent;
      else
        EXPECT_EQ(weight, std::ldexp(1.0F, 126));
    }
  }
  EXPECT_EQ(as_float(token_scale(0)), std::ldexp(1.0F, 112));
  EXPECT_EQ(weight_scale(0), kDefaultWeightScale);
  EXPECT_EQ(as_float(kDefaultWeightScale), 4096.0F);
  const uint32_t infinity = 0x7f800000U;  // its other numbers may be as large as float32's
  EXPECT_LT(as_float(0x7f7fffffU) * as_float(token_scale(infinity)), 65504.0F);
  EXPECT_LT(as_float(0x7f7fffffU) * as_float(weight_scale(infinity)), 65504.0F);
}

/// Half a warp is served at a time where each lane reads 8 bytes, and reads or writes every bank once.
TEST(RouterLogitsLayout, SharedMemoryIsAccessedWithoutConflicts) {
  for (int instruction = 0; instruction < kInstructionsPerStep; ++instruction) {
    for (int d = 0; d < 2; ++d) {
      for (int first_lane = 0; first_lane < 32; first_lane += 16) {
        std::set<uint32_t> banks;
        for (int lane = first_lane; lane < first_lane + 16; ++lane) {
          banks.insert(weight_offset(lane, instruction, d) / 4 % 32);
          banks.insert((weight_offset(lane, instruction, d) / 4 + 1) % 32);
        }
        EXPECT_EQ(banks.size(), 32U);
      }
    }
  }
  for (int instruction = 0; instruction < kInstructionsPerStep; ++instruction) {
    for (int matrix = 0; matrix < 4; ++matrix) {  // a matrix is served at a time, 16 bytes for each of 8 lanes
      std::set<uint32_t> banks;
      for (int lane = 8 * matrix; lane < 8 * matrix + 8; ++lane) banks.insert(token_offset(lane, instruction) / 16 % 8);
      EXPECT_EQ(banks.size(), 8U);
    }
  }
  for (int h = 0; h < 2; ++h) {
    std::set<int> banks;
    for (int lane = 0; lane < 32; ++lane) {
      banks.insert((token_of_sum(lane, 0, 0) * kPartialStride + expert_of_sum(0, lane, h)) % 32);
    }
    EXPECT_EQ(banks.size(), 32U);
  }
}

TEST(RouterLogitsLayout, GroupsCoverTheDepth) {
  for (const int num_steps : {1, 2, 7, 8, 9, 32, 48, 96, 112, 128}) {
    EXPECT_EQ(first_step(0, num_steps), 0);
    EXPECT_EQ(first_step(kGroups, num_steps), num_steps);
    for (int g = 0; g < kGroups; ++g) EXPECT_LE(first_step(g, num_steps), first_step(g + 1, num_steps));
  }
}

TEST(RouterLogitsLayout, EveryUnitOnce) {
  for (const Mode mode : {Mode::kSome, Mode::kMany}) {
    for (const auto& [tokens, experts] : {std::pair{129, 768}, {257, 130}, {1024, 7}, {5000, 896}}) {
      const Units units = units_of(mode, tokens, experts);
      std::set<std::array<int, 3>> seen;
      for (int i = 0; i < units.count(); ++i) {
        const Unit unit = units[i];
        EXPECT_LT(unit.expert_tile * kManyExperts, experts);
        EXPECT_LT(unit.pair * kPair * kManyTokens, tokens);
        for (int g = unit.first_group; g < unit.last_group; ++g) {
          EXPECT_TRUE(seen.insert({unit.expert_tile, unit.pair, g}).second);
        }
      }
      EXPECT_EQ(static_cast<int64_t>(seen.size()),
                divide_up(experts, kManyExperts) * divide_up(tokens, int64_t{kPair} * kManyTokens) * kGroups);
    }
  }
  EXPECT_EQ(choose_mode(1, 768, 6144, 132), Mode::kFew);
  EXPECT_EQ(choose_mode(kFewMaxTokens, 768, 6144, 132), Mode::kFew);
  EXPECT_EQ(choose_mode(256, 768, 6144, 132), Mode::kSome);
  EXPECT_EQ(choose_mode(1024, 768, 6144, 132), Mode::kSome);
  EXPECT_EQ(choose_mode(16384, 768, 6144, 132), Mode::kMany);
  for (int64_t tokens = 1; tokens <= kFewMaxTokens; ++tokens) EXPECT_GE(few_tokens_width(tokens), tokens);
}

// The ring of a pair of blocks

/// A barrier that counts arrivals and bytes.
struct Barrier {
  int num_arrivals;
  int pending = num_arrivals;
  int64_t bytes = 0;
  uint32_t phase = 0;

  explicit Barrier(int arrivals) : num_arrivals(arrivals) {}
  bool is_over(uint32_t parity) const { return (phase & 1U) != parity; }
  void arrive(int64_t expected = 0) {
    ASSERT_GT(pending, 0);
    --pending;
    bytes += expected;
    end_phase();
  }
  void complete(int64_t count) {
    bytes -= count;
    end_phase();
  }
  void end_phase() {
    if (pending == 0 && bytes == 0) {
      ++phase;
      pending = num_arrivals;
    }
  }
};

/// Producers, consumers and copies of both blocks in a random order: nothing is overwritten before it has been read,
/// consumers find what they want, and everyone ends.
TEST(RouterLogitsLayout, APairOfBlocksWalksItsRing) {
  constexpr int kWarps = 4 * kManyWarpgroups;
  constexpr int kPart = 100;
  constexpr int kTokens = 70;
  for (const int stages : {2, 3, 4}) {
    for (uint32_t seed = 0; seed < 200; ++seed) {
      std::mt19937 random(seed);
      const int steps = static_cast<int>(random() % 40) + 1;
      struct Copy {
        int block, stage, part, step;  // part 0, 1: of the weights, 2: hidden states
      };
      struct Block {
        std::vector<Barrier> full, empty;
        std::vector<std::array<int, 3>> content;  // step of each part
        int loaded = 0;                           // steps the producer has started
        std::array<int, kWarps> done{};           // steps each warp is through with
      };
      std::vector<Block> blocks(kPair);
      for (Block& block : blocks) {
        block.full.assign(static_cast<size_t>(stages), Barrier(1));
        block.empty.assign(static_cast<size_t>(stages), Barrier(kPair * kWarps));
        block.content.assign(static_cast<size_t>(stages), {-1, -1, -1});
      }
      std::vector<Copy> copies;
      int idle = 0;
      const auto is_finished = [&] {
        return std::all_of(blocks.begin(), blocks.end(), [&](const Block& block) {
          return std::all_of(block.done.begin(), block.done.end(), [&](int done) { return done == steps; });
        });
      };
      while (!is_finished()) {
        ASSERT_LT(++idle, 100000) << "nobody moves";
        const auto b = random() % kPair;
        Block& block = blocks[b];
        const auto actor = random() % (kWarps + 4);
        if (actor < kWarps) {
          int& step = block.done[actor];
          const auto stage = static_cast<size_t>(step % stages);
          const auto parity = static_cast<uint32_t>(step / stages % 2);
          if (step < steps && block.full[stage].is_over(parity)) {
            ASSERT_EQ(block.content[stage], (std::array{step, step, step}));
            for (Block& other : blocks) other.empty[stage].arrive();
            ++step;
            idle = 0;
          }
        } else if (actor == kWarps) {
          const auto stage = static_cast<size_t>(block.loaded % stages);
          const auto parity = static_cast<uint32_t>(block.loaded / stages % 2);
          if (block.loaded < steps && block.empty[stage].is_over(parity ^ 1U)) {
            block.full[stage].arrive(2 * kPart + kTokens);
            for (int to = 0; to < kPair; ++to) {
              copies.push_back({to, static_cast<int>(stage), static_cast<int>(b), block.loaded});
            }
            copies.push_back({static_cast<int>(b), static_cast<int>(stage), 2, block.loaded});
            ++block.loaded;
            idle = 0;
          }
        } else if (!copies.empty()) {
          const auto which = random() % copies.size();
          const Copy copy = copies[which];
          copies.erase(copies.begin() + static_cast<int64_t>(which));
          Block& target = blocks[static_cast<size_t>(copy.block)];
          const auto stage = static_cast<size_t>(copy.stage);
          for (const int done : target.done) ASSERT_GT(done, copy.step - stages) << "overwritten before it was read";
          target.content[stage][static_cast<size_t>(copy.part)] = copy.step;
          target.full[stage].complete(copy.part == 2 ? kTokens : kPart);
          idle = 0;
        }
      }
      EXPECT_TRUE(copies.empty());
    }
  }
}

}  // namespace
}  // namespace zexpert::cuda::router
