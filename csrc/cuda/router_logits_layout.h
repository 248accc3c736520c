// SPDX-License-Identifier: Apache-2.0
// How router_logits is computed on Hopper: which sums are added in which order, who computes them, and where operands
// are in shared memory. Host code too, so that tests need no GPU.
//
// Numbers. Matrix instructions multiply float16. The depth is cut into chunks of kStepDepth. Powers of two scale a
// chunk of a token's bfloat16 hidden states and a chunk of an expert's float32 weights into float16's range. A scaled
// weight is the sum of two float16 numbers, which hold all of a float32's bits; a hidden state is one.
//
// Order of sums. A matrix instruction drops the bits of a sum that float32 does not hold instead of rounding it, so
// these errors add up. They stay small because matrix instructions accumulate the products of one chunk alone, those
// of the weights' low parts first. Chunks are added to their group's sum in float32, in the order of depth: the depth
// is cut into kGroups groups. Their bounds depend on the depth alone. Groups are added to the logit in the same way.
// Every kernel below keeps this order, so a token's logits have the same bits for any number of tokens.
//
//   few tokens   a cluster of kGroups blocks for 64 experts: a block per group, sums exchanged through shared memory.
//                Weights are split in registers, and are the instruction's rows
//   some tokens  a pair of blocks for 128 experts, 2 tiles of tokens and one group; another kernel splits the weights
//                first, a third adds the groups. Tokens are the instruction's rows
//   many tokens  a pair of blocks for 128 experts and 2 tiles of tokens, all groups; split weights as before
#pragma once

#include <cstdint>

#include "cuda/host_device.h"

namespace zexpert::cuda::router {

inline constexpr int kGroups = 8;
inline constexpr int kStepDepth = 64;  ///< elements of depth of a chunk and a pipeline stage: one line of hidden states
inline constexpr int kInstructionDepth = 16;
inline constexpr int kInstructionsPerStep = kStepDepth / kInstructionDepth;
inline constexpr int kInstructionRows = 64;
inline constexpr int kLineBytes = 128;  ///< both operands' lines, swizzled in periods of kSwizzleBytes
inline constexpr int kSwizzleBytes = 1024;
inline constexpr int kWeightLineDepth = 32;  ///< float32 weights of a line, so that a step has two
inline constexpr int kWeightHalves = kStepDepth / kWeightLineDepth;
inline constexpr int kParts = 2;  ///< float16 numbers of a weight: high and low
inline constexpr int kPair = 2;   ///< blocks that share the weights of many tokens
static_assert(kPair == kParts, "each block of a pair loads one part of the weights");

/// Steps of depth before group `group`, at kGroups all.
ZEXPERT_HOST_DEVICE constexpr int first_step(int group, int num_steps) {
  return static_cast<int>(static_cast<int64_t>(group) * num_steps / kGroups);
}

// Powers of two as the bits of a float32, from the bits of the largest magnitude of a chunk.

inline constexpr uint32_t kExponentShift = 23;
inline constexpr uint32_t kDefaultWeightScale = (127U + 12U) << kExponentShift;

/// Brings the largest hidden state into [2^14, 2^15), which float16 holds with all bits of those down to 2^-31 of it.
/// At most 2^112, which suffices for every bfloat16 number.
ZEXPERT_HOST_DEVICE constexpr uint32_t token_scale(uint32_t largest) {
  const uint32_t exponent = (largest & 0x7fffffffU) >> kExponentShift;
  constexpr uint32_t kMost = 127 + 112;
  return (exponent > 268U - kMost ? 268U - exponent : kMost) << kExponentShift;
}

/// 2^12 for a largest weight of 0 or in [2^-13, 2^3): weights and low parts then are in float16's range. Routers'
/// weights are, so that their sums need no factor for each expert. Otherwise brings the largest into [2^14, 2^15).
ZEXPERT_HOST_DEVICE constexpr uint32_t weight_scale(uint32_t largest) {
  const uint32_t exponent = (largest & 0x7fffffffU) >> kExponentShift;
  if ((exponent >= 127U - 13U && exponent < 127U + 3U) || largest == 0)
    return kDefaultWeightScale;
  constexpr uint32_t kMost = 253;  // so that the inverse is a normal number
  return (exponent > 268U - kMost ? 268U - exponent : kMost) << kExponentShift;
}

ZEXPERT_HOST_DEVICE constexpr uint32_t inverse_scale(uint32_t scale) { return (254U << kExponentShift) - scale; }

// Few tokens' weights in shared memory: [halves of depth][experts][kLineBytes], as the copy engine swizzles them. A
// thread's operand of an instruction is, for h = 0, 1 and d = 0, 1: weights of fragment row l / 4 + 8 * h, depth 2 * (l
// % 4) + 8
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

// The sums of an instruction with experts as rows: lane l of warp w has, in sums[4 * j + 2 * h + i], the sum of this
// expert and token of the tile.
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
inline constexpr int kManyWarpgroups = kManyTokens / kInstructionRows;

/// Offset in bytes of the 16 bytes of hidden states that lane `lane` points to when a warp loads its operand of an
/// instruction: matrices of 8 tokens by 8 elements, tokens 0 .. 7 and 8 .. 15 of the first half of depth, then of the
/// second. From the warp's first line, which begins a period of the swizzle.
ZEXPERT_HOST_DEVICE constexpr uint32_t token_offset(int lane, int instruction) {
  const int token = lane % 16;
  const int chunk = 2 * instruction + lane / 16;
  return static_cast<uint32_t>(token * kLineBytes + (chunk ^ token % 8) * 16);
}

// The sums of an instruction with tokens as rows: sums[4 * j + 2 * h + i] is that of this token and expert.
ZEXPERT_HOST_DEVICE constexpr int token_of_row(int warp, int lane, int h) { return 16 * warp + 8 * h + lane / 4; }
ZEXPERT_HOST_DEVICE constexpr int expert_of_column(int lane, int j, int i) { return 8 * j + 2 * (lane % 4) + i; }

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
  constexpr double kCyclesPerStep = kInstructionsPerStep * kParts * kManyWarpgroups * kManyExperts / 2.0;
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
