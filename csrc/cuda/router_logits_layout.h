// SPDX-License-Identifier: Apache-2.0
// How router_logits is computed on Hopper: which sums are added in which order, who computes them, and where operands
// are in shared memory. Host code too, so that tests need no GPU.
//
// Order of sums. The depth is cut into kGroups groups, whose bounds depend on the depth alone, and a group into chunks
// of kChunkSteps steps. A matrix instruction drops the bits of a sum that float32 does not hold instead of rounding it,
// so these errors add up. They stay small because only a chunk's products are accumulated by matrix instructions.
// Chunks are added to their group's sum, and groups to the logit, in float32 in the order of depth. Every kernel below
// keeps this order, so a token's logits have the same bits for any number of tokens.
//
//   few tokens   a cluster of kGroups blocks for 64 experts: a block per group, sums exchanged through shared memory
//   some tokens  a pair of blocks for 128 experts, 2 tiles of tokens and one group; a second kernel adds the groups
//   many tokens  a pair of blocks for 128 experts and 2 tiles of tokens, all groups
#pragma once

#include <cstdint>

#include "cuda/host_device.h"

namespace zexpert::cuda::router {

inline constexpr int kGroups = 8;
inline constexpr int kChunkSteps = 1;
inline constexpr int kStepDepth = 64;  ///< elements of depth of a pipeline stage: one line of hidden states
inline constexpr int kInstructionDepth = 16;
inline constexpr int kInstructionsPerStep = kStepDepth / kInstructionDepth;
inline constexpr int kInstructionRows = 64;  ///< experts of a matrix instruction
inline constexpr int kLineBytes = 128;       ///< both operands' lines, swizzled in periods of kSwizzleBytes
inline constexpr int kSwizzleBytes = 1024;
inline constexpr int kWeightLineDepth = 32;  ///< float32 weights of a line, so that a step has two
inline constexpr int kWeightHalves = kStepDepth / kWeightLineDepth;
inline constexpr int kPair = 2;  ///< blocks that share the weights of many tokens
static_assert(kPair == kWeightHalves, "each block of a pair loads one half of the weights");

/// Steps of depth before group `group`, at kGroups all.
ZEXPERT_HOST_DEVICE constexpr int first_step(int group, int num_steps) {
  return static_cast<int>(static_cast<int64_t>(group) * num_steps / kGroups);
}

/// How many bfloat16 numbers a weight is split into. Three hold all of a float32's digits. Two leave errors of up to
/// 2^-18 of a weight, five times the error of a float32 product.
inline constexpr int kWeightParts = 3;

// Weights in shared memory: [halves of depth][experts][kLineBytes], as the copy engine swizzles them. A thread's
// operand of an instruction is, for h = 0, 1 and d = 0, 1: weights of fragment row l / 4 + 8 * h, depth 2 * (l % 4) + 8
// * d and the next. Fragment rows are permuted, so that the 16 lanes that are served together read all banks once.

/// The expert, of 8, that fragment row 0 .. 7 holds.
ZEXPERT_HOST_DEVICE constexpr int expert_of_fragment_row(int row) { return 2 * (row % 4) + row / 4; }

/// Offset in bytes, from a line that begins a period of the swizzle, of the pair of weights of lane `lane`.
/// `instruction` is that of the step, 0 .. kInstructionsPerStep - 1. Add the offset of the half, of `warp` * 16 lines,
/// and of 8 * h lines.
ZEXPERT_HOST_DEVICE constexpr uint32_t weight_offset(int lane, int instruction, int d) {
  const int expert = expert_of_fragment_row(lane / 4);
  const int in_line = (instruction % 2 * kInstructionDepth + 8 * d + 2 * (lane % 4)) * 4;
  const int chunk = in_line / 16;
  return static_cast<uint32_t>(expert * kLineBytes + (chunk ^ expert) * 16 + in_line % 16);
}

// The sums of an instruction: lane l of warp w has, in sums[4 * j + 2 * h + i], the sum of this expert and token of the
// tile.
ZEXPERT_HOST_DEVICE constexpr int expert_of_sum(int warp, int lane, int h) {
  return 16 * warp + 8 * h + expert_of_fragment_row(lane / 4);
}
ZEXPERT_HOST_DEVICE constexpr int token_of_sum(int lane, int j, int i) { return 8 * j + 2 * (lane % 4) + i; }

// Few tokens: a block's sums in shared memory, for the cluster: [tokens][kPartialStride].
inline constexpr int kFewExperts = kInstructionRows;
inline constexpr int kFewMaxTokens = 128;
inline constexpr int kPartialStride = kFewExperts + 4;  ///< lanes that store together use all banks

/// The width of the instructions for `num_tokens`, at most kFewMaxTokens.
ZEXPERT_HOST_DEVICE constexpr int few_tokens_width(int64_t num_tokens) {
  return num_tokens <= 8 ? 8 : num_tokens <= 16 ? 16 : num_tokens <= 32 ? 32 : num_tokens <= 64 ? 64 : 128;
}

// Some and many tokens.
inline constexpr int kManyExperts = 128;
inline constexpr int kManyTokens = 128;  ///< of each block of a pair
inline constexpr int kManyWarpgroups = kManyExperts / kInstructionRows;

enum class Mode { kFew, kSome, kMany };

/// The work of a pair of blocks: the tokens of its block `rank` begin at (pair * kPair + rank) * kManyTokens.
struct Unit {
  int expert_tile;
  int pair;
  int first_group;
  int last_group;  ///< behind the unit's last
};

/// The units of a launch. Those that share tokens follow each other.
struct Units {
  int num_expert_tiles;
  int num_pairs;
  int groups_per_unit;

  ZEXPERT_HOST_DEVICE int count() const { return num_expert_tiles * num_pairs * (kGroups / groups_per_unit); }
  ZEXPERT_HOST_DEVICE Unit operator[](int index) const {
    const int expert_tile = index % num_expert_tiles;
    const int rest = index / num_expert_tiles;
    const int group = rest / num_pairs * groups_per_unit;
    return {expert_tile, rest % num_pairs, group, group + groups_per_unit};
  }
};

inline Units units_of(Mode mode, int64_t num_tokens, int64_t num_experts) {
  return {static_cast<int>(divide_up(num_experts, kManyExperts)),
          static_cast<int>(divide_up(num_tokens, int64_t{kPair} * kManyTokens)), mode == Mode::kMany ? kGroups : 1};
}

/// Chooses the kernel by estimated cycles. Results do not depend on it.
inline Mode choose_mode(int64_t num_tokens, int64_t num_experts, int64_t hidden_size, int num_multiprocessors) {
  if (num_tokens <= kFewMaxTokens) {
    return Mode::kFew;
  }
  constexpr double kBytesPerCycle = 2500;  // of partial sums, written and read again
  constexpr double kSecondKernel = 4000;
  constexpr double kStart = 1500;  // of a unit: until its first stage is there
  const int64_t num_pairs = num_multiprocessors < kPair ? 1 : num_multiprocessors / kPair;
  constexpr double kCyclesPerStep = kInstructionsPerStep * kWeightParts * kManyWarpgroups * kManyTokens / 2.0;
  const auto product_cycles = [&](Mode mode) {
    const Units units = units_of(mode, num_tokens, num_experts);
    const auto rounds = static_cast<double>(divide_up(units.count(), num_pairs));
    const double steps = static_cast<double>(divide_up(hidden_size, kStepDepth) * units.groups_per_unit) / kGroups;
    return rounds * (steps * kCyclesPerStep + kStart);
  };
  const auto partial_bytes = static_cast<double>(2 * kGroups * 4 * num_tokens * num_experts);
  const double some_cycles = product_cycles(Mode::kSome) + kSecondKernel + partial_bytes / kBytesPerCycle;
  return some_cycles < product_cycles(Mode::kMany) ? Mode::kSome : Mode::kMany;
}

}  // namespace zexpert::cuda::router
