// SPDX-License-Identifier: Apache-2.0
// Where the grouped products' operands are: what the copy engine (TMA) copies to which place of shared memory, how the
// matrix instruction (wgmma) finds it there, and which channels' sums a warp then holds. Host code too, so that tests
// need no GPU.
//
// Each of two warpgroups runs two matrix instructions of 64 weight rows at a time. In a tall tile the warpgroups have
// different weight rows, 256 in all, and each multiplies all of the tile's rows. In a wide tile both have the same 128
// weight rows, and each multiplies half of the tile's rows.
//
// A weight tile has a group of channels for each warp with weight rows of its own, 8 or 4 warps; a group is what a warp
// sums. Both instructions ("halves") multiply 16 weight rows of every warp's group:
//
//   gate and up: a group is 16 channels. Half h has the gate rows of its channels 8h .. 8h + 7, then their up rows.
//                A thread's sums of rows i and i + 8 of an instruction are gate and up of one channel.
//   down:        a group is 32 channels. Half h has the rows of its channels 16h .. 16h + 15.
//
// Either way a warp holds neighbouring channels, and one box of the copy engine is the half of a tile, 128 or 64 rows
// of 64 elements: for each group, for each of its matrices (gate, up), the rows of the half.
#pragma once

#include <cstdint>

#include "cuda/grouped_mlp/schedule.h"

namespace zexpert::cuda {

enum class Product { kGateUp, kDown };
enum class Tiles { kTall, kWide };

inline constexpr int kElementBytes = 2;       ///< bfloat16 or float16; float8 elements have 1
inline constexpr int kLineBytes = 128;        ///< of depth in a pipeline stage: one swizzled line
inline constexpr int kInstructionBytes = 32;  ///< of depth in a matrix instruction
inline constexpr int kInstructionsPerStep = kLineBytes / kInstructionBytes;
/// Elements of depth that a pipeline stage holds. For float8 elements it is one block of scales.
ZEXPERT_HOST_DEVICE constexpr int step_depth(int element_bytes) { return kLineBytes / element_bytes; }
inline constexpr int kWarpgroups = 2;
inline constexpr int kWarpsPerWarpgroup = 4;
inline constexpr int kHalves = 2;
inline constexpr int kInstructionRows = 64;  ///< weight rows of an instruction
inline constexpr int kSwizzleBytes = 1024;   ///< the pattern's period: 8 lines

/// Warpgroups that a tile's weight rows are divided among, and its token rows.
ZEXPERT_HOST_DEVICE constexpr int weight_parts(Tiles tiles) { return tiles == Tiles::kTall ? kWarpgroups : 1; }
ZEXPERT_HOST_DEVICE constexpr int row_parts(Tiles tiles) { return kWarpgroups / weight_parts(tiles); }

/// Bytes of weights in a stage, and of one half's.
ZEXPERT_HOST_DEVICE constexpr int half_bytes(Tiles tiles) {
  return weight_parts(tiles) * kInstructionRows * kLineBytes;
}
ZEXPERT_HOST_DEVICE constexpr int weight_bytes(Tiles tiles) { return kHalves * half_bytes(tiles); }

ZEXPERT_HOST_DEVICE constexpr int group_channels(Product product) { return product == Product::kGateUp ? 16 : 32; }
ZEXPERT_HOST_DEVICE constexpr int num_matrices(Product product) { return product == Product::kGateUp ? 2 : 1; }
ZEXPERT_HOST_DEVICE constexpr int num_groups(Tiles tiles) { return weight_parts(tiles) * kWarpsPerWarpgroup; }
ZEXPERT_HOST_DEVICE constexpr int tile_channels(Product product, Tiles tiles) {
  return num_groups(tiles) * group_channels(product);
}

inline constexpr int kMaxTensorRank = 5;

/// The arguments of cuTensorMapEncodeTiled.
struct TensorMapShape {
  uint32_t rank;
  uint64_t sizes[kMaxTensorRank];
  uint64_t strides[kMaxTensorRank];  ///< bytes; the first is the element's size, which the driver is not given
  uint32_t box[kMaxTensorRank];
};

/// Weights [num_experts, matrices, num_channels, depth] as [experts, groups, matrices, channels of a group, depth].
/// num_channels is a multiple of 64. Groups past the last are read as 0.
inline TensorMapShape weights_map(Product product, Tiles tiles, int64_t num_channels, int64_t depth,
                                  int64_t num_experts, int64_t expert_stride, int element_bytes) {
  const auto size = [](int64_t value) { return static_cast<uint64_t>(value); };
  const int group = group_channels(product);
  return {5,
          {size(depth), size(group), size(num_matrices(product)), size(num_channels / group), size(num_experts)},
          {size(element_bytes), size(depth * element_bytes), size(num_channels * depth * element_bytes),
           size(group * depth * element_bytes), size(expert_stride * element_bytes)},
          {static_cast<uint32_t>(step_depth(element_bytes)), static_cast<uint32_t>(group / kHalves),
           static_cast<uint32_t>(num_matrices(product)), static_cast<uint32_t>(num_groups(tiles)), 1}};
}

/// Where the box of one half of a weight tile begins, at `depth`.
struct WeightBox {
  int coordinates[kMaxTensorRank];
};
ZEXPERT_HOST_DEVICE WeightBox weight_box(Product product, Tiles tiles, int expert, int weight_tile, int half,
                                         int depth) {
  return {{depth, half * group_channels(product) / kHalves, 0, weight_tile * num_groups(tiles), expert}};
}

// The rows of a tile come in boxes of 8, 16, 32, ... lines, the largest first, for any multiple of 8.
inline constexpr int kRowBoxes = 6;

inline TensorMapShape rows_map(int64_t num_rows, int64_t depth, int64_t row_stride, int box, int element_bytes) {
  return {2,
          {static_cast<uint64_t>(depth), static_cast<uint64_t>(num_rows)},
          {static_cast<uint64_t>(element_bytes), static_cast<uint64_t>(row_stride * element_bytes)},
          {static_cast<uint32_t>(step_depth(element_bytes)), static_cast<uint32_t>(kRowStep << box)}};
}

/// Rows' scales [blocks of depth, padded_scale_rows]: a stage has those of its step, `most_rows` of them.
inline TensorMapShape row_scales_map(int64_t padded_rows, int64_t num_blocks, int most_rows) {
  return {2,
          {static_cast<uint64_t>(padded_rows), static_cast<uint64_t>(num_blocks)},
          {sizeof(float), static_cast<uint64_t>(padded_rows) * sizeof(float)},
          {static_cast<uint32_t>(most_rows), 1}};
}

/// Calls fn(box, line) for the boxes that hold a tile's `num_columns` rows; `line` is the first one's place in the
/// tile.
template <typename Fn>
ZEXPERT_HOST_DEVICE void for_each_row_box(int num_columns, const Fn& fn) {
  int line = 0;
  for (int box = kRowBoxes - 1; box >= 0; --box) {
    const int num_lines = kRowStep << box;
    if ((num_columns & num_lines) != 0) {
      fn(box, line);
      line += num_lines;
    }
  }
}

/// The matrix instruction's description of an operand with the 128-byte swizzle. Depth runs along the lines of both
/// operands: 8 lines are adjacent, the next 8 are kSwizzleBytes further. `address` is that of the first line in shared
/// memory, plus kInstructionBytes for every instruction along the depth; the swizzle depends on the bits of the
/// address.
ZEXPERT_HOST_DEVICE uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kStride = uint64_t{kSwizzleBytes / 16} << 32;
  constexpr uint64_t kUnusedLeading = uint64_t{1} << 16;
  return kSwizzle128 | kStride | kUnusedLeading | ((address & 0x3ffffU) >> 4);
}
/// What an instruction's depth adds to a descriptor.
inline constexpr uint64_t kDescriptorStep = kInstructionBytes / 16;

/// First channel that a warp holds sums of.
ZEXPERT_HOST_DEVICE int first_channel(Product product, Tiles tiles, int weight_tile, int warpgroup, int warp) {
  const int part = warpgroup % weight_parts(tiles);
  const int group = weight_tile * num_groups(tiles) + part * kWarpsPerWarpgroup + warp;
  return group * group_channels(product);
}

inline constexpr int kStagingBytes = 512;

/// Before it writes, a warp transposes four matrices of 8 by 8 elements at a time, in shared memory of its own: as many
/// rows as they hold of all its channels. Rows are adjacent there, in units of 16 bytes, 8 channels. Units are permuted
/// so that no two of the 8 that are accessed together share a bank. Afterwards each lane has a unit.
template <Product kProduct>
struct OutputTurn {
  static constexpr int kUnits = group_channels(kProduct) / 8;  ///< of a row
  static constexpr int kRows = 8 * 4 / kUnits;

  /// Where row `row` of `unit` is.
  ZEXPERT_HOST_DEVICE static uint32_t offset(int row, int unit) {
    const int swizzle = row * kUnits / 8 % kUnits;
    return static_cast<uint32_t>(row * kUnits + (unit ^ swizzle)) * 16U;
  }
  /// The address that lane `lane` passes to the transposing store: of row lane % 8 of matrix lane / 8. Matrices are the
  /// units of the first 8 rows, then those of the next.
  ZEXPERT_HOST_DEVICE static uint32_t store_offset(int lane) {
    return offset(lane / 8 / kUnits * 8 + lane % 8, lane / 8 % kUnits);
  }
  ZEXPERT_HOST_DEVICE static uint32_t load_offset(int lane) { return offset(row(lane), lane % kUnits); }
  /// The row and the first of the channels that lane `lane` has afterwards.
  ZEXPERT_HOST_DEVICE static int row(int lane) { return lane / kUnits; }
  ZEXPERT_HOST_DEVICE static int channel(int lane) { return lane % kUnits * 8; }
};

}  // namespace zexpert::cuda
