// SPDX-License-Identifier: Apache-2.0
// Which part of a grouped product a block computes. Host code too, so that tests need no GPU.
//
// The products' operands are swapped: an expert's weight rows are the rows of the matrix instruction, the tokens' rows
// its columns. The number of columns is any multiple of 8. A segment of rows is cut into row tiles of nearly equal
// length, the weight rows into weight tiles; a tile is one of each.
#pragma once

#include <cstdint>

#include "cuda/host_device.h"

namespace zexpert::cuda {

inline constexpr int kRowStep = 8;  ///< a row tile is computed as if it had a multiple of these
/// This many neighbouring blocks compute row tiles of one weight tile, so that its weights are read from device memory
/// once. More would read more rows per pass over the weights than the L2 cache holds if one expert has nearly all rows.
inline constexpr int kRowTilesAtOnce = 8;
inline constexpr int kMaxParts = 8;          ///< of a tile's depth, on average
inline constexpr int kLeastStepsOfPart = 4;  ///< on average; less would not fill the pipeline

/// A segment's row tiles: as few as possible of at most `max_rows_per_tile` (a multiple of kRowStep), as equal as that
/// step allows. None is empty.
struct SegmentTiles {
  int num_tiles;
  int rows_per_tile;  ///< a multiple of kRowStep; the last tile may have fewer rows
};

ZEXPERT_HOST_DEVICE SegmentTiles split_segment(int num_rows, int max_rows_per_tile) {
  if (num_rows <= 0) {
    return {0, 0};
  }
  const int num_tiles = (num_rows + max_rows_per_tile - 1) / max_rows_per_tile;
  const int rows_per_tile = round_up((num_rows + num_tiles - 1) / num_tiles, kRowStep);
  return {(num_rows + rows_per_tile - 1) / rows_per_tile, rows_per_tile};
}

/// Scales of rows are in segments that begin at multiples of this: the copy engine reads from multiples of 16 bytes.
inline constexpr int kScaleRowStep = 4;

/// Where the scales of an expert's rows begin, in a row of padded_scale_rows.
ZEXPERT_HOST_DEVICE int first_scale(int segment_begin, int expert) {
  return (segment_begin / kScaleRowStep + expert) * kScaleRowStep;
}

inline int64_t padded_scale_rows(int64_t num_rows, int64_t num_experts) {
  return (divide_up(num_rows, kScaleRowStep) + num_experts) * kScaleRowStep;
}

/// A tile, or a part of one's depth.
struct WorkItem {
  int expert;
  int weight_tile;  ///< of the expert
  int first_row;    ///< of all rows
  int num_rows;     ///< none: there is no more work
  int first_scale;  ///< place of the first row's scale
  int first_step;   ///< of the depth
  int last_step;    ///< exclusive; more than first_step
  int part;         ///< of the tile
  int num_parts;    ///< of the tile; part i belongs to block first_block + i
  int first_block;
};

/// Rows of a tile that one warpgroup computes.
struct PartRows {
  int first_row;    ///< of the tile, a multiple of kRowStep
  int num_rows;     ///< may be none
  int num_columns;  ///< of the matrix instruction; at least kRowStep
};

/// Part `part` of a tile's rows that are divided among `num_parts` warpgroups, 1 or 2.
ZEXPERT_HOST_DEVICE PartRows rows_of_part(int num_rows, int part, int num_parts) {
  const int first_columns = round_up((num_rows + num_parts - 1) / num_parts, kRowStep);
  if (part == 0) {
    return {0, num_rows < first_columns ? num_rows : first_columns, first_columns};
  }
  const int rest = num_rows - first_columns;
  return {first_columns, rest > 0 ? rest : 0, rest > 0 ? round_up(rest, kRowStep) : kRowStep};
}

/// Loads data written two launches back. Safe before griddepcontrol.wait, but only through L2 (ld.cg).
ZEXPERT_HOST_DEVICE int load_older(const int* pointer) {
#ifdef __CUDA_ARCH__
  return __ldcg(pointer);
#else
  return *pointer;
#endif
}

/// The work of one product, computed from the experts' offsets. Either blocks have whole tiles, or, where these are few
/// and a last round of them could leave most blocks idle, the steps of all tiles together are divided equally among
/// the blocks: then a block may have the end of one tile, whole ones, and the beginning of another.
struct Schedule {
  const int* expert_offsets;   ///< [num_experts + 1]
  const int* row_tile_starts;  ///< [num_experts + 1]: row tiles of the experts before
  int num_experts;
  int num_weight_tiles;  ///< of an expert
  int num_steps;         ///< of a tile
  int num_blocks;
  int rounds_to_divide;  ///< steps are divided if there are fewer rounds of tiles than this

  ZEXPERT_HOST_DEVICE int num_tiles() const { return row_tile_starts[num_experts] * num_weight_tiles; }

  /// The tile's expert, weight tile and rows. Divisions are slow: the usual case needs two.
  ZEXPERT_HOST_DEVICE WorkItem whole_tile(int tile) const {
    WorkItem work;
    work.first_step = 0;
    work.last_step = num_steps;
    work.part = 0;
    work.num_parts = 1;
    work.first_block = 0;

    // The last expert whose tiles begin at or before this one: those without rows begin where the next one does.
    int low = 0;
    int high = num_experts;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      const bool before = row_tile_starts[middle] * num_weight_tiles <= tile;
      low = before ? middle : low;
      high = before ? high : middle;
    }
    work.expert = low;

    const int segment_begin = load_older(expert_offsets + low);
    const int segment_rows = load_older(expert_offsets + low + 1) - segment_begin;
    const int num_row_tiles = row_tile_starts[low + 1] - row_tile_starts[low];
    const int rows_per_tile = round_up((segment_rows + num_row_tiles - 1) / num_row_tiles, kRowStep);
    int index_in_group = tile - row_tile_starts[low] * num_weight_tiles;
    int first_row_tile = 0;
    int group_size = num_row_tiles;
    if (num_row_tiles > kRowTilesAtOnce) {
      const int group = index_in_group / (kRowTilesAtOnce * num_weight_tiles);
      index_in_group -= group * kRowTilesAtOnce * num_weight_tiles;
      first_row_tile = group * kRowTilesAtOnce;
      const int rest = num_row_tiles - first_row_tile;
      group_size = rest < kRowTilesAtOnce ? rest : kRowTilesAtOnce;
    }
    work.weight_tile = index_in_group / group_size;
    const int row_tile = first_row_tile + index_in_group - work.weight_tile * group_size;
    const int rows_left = segment_rows - row_tile * rows_per_tile;
    work.first_row = segment_begin + row_tile * rows_per_tile;
    work.first_scale = first_scale(segment_begin, low) + row_tile * rows_per_tile;
    work.num_rows = rows_left < rows_per_tile ? rows_left : rows_per_tile;
    return work;
  }
};

/// Returns the value and shows the compiler that it is the only one in the warp. The copy engine's arguments are
/// uniform registers: a value that might differ between threads costs a loop over them. The warp's first thread calls
/// this alone.
ZEXPERT_HOST_DEVICE int lone_thread_value(int value) {
#ifdef __CUDA_ARCH__
  return __shfl_sync(1U, value, 0);
#else
  return value;
#endif
}

/// Calls fn(work) for the items of block `block`, one after another. Whole tiles go to blocks in turn: take_ticket()
/// counts 0, 1, 2, ... over all blocks, and is called early because it is slow. Where steps are divided, the steps of
/// all tiles are numbered through.
template <typename TakeTicket, typename Fn>
ZEXPERT_HOST_DEVICE void for_each_item(const Schedule& schedule, int block, const TakeTicket& take_ticket,
                                       const Fn& fn) {
  const int num_tiles = schedule.num_tiles();
  if (num_tiles >= schedule.rounds_to_divide * schedule.num_blocks) {
    for (int tile = block; tile < num_tiles;) {
      const int ticket = take_ticket();
      fn(schedule.whole_tile(tile));
      tile = schedule.num_blocks + lone_thread_value(ticket);
    }
    return;
  }
  const int64_t num_steps = schedule.num_steps;
  const int64_t all_steps = num_tiles * num_steps;
  const auto at_most = [](int64_t value, int64_t most) { return value < most ? value : most; };
  int64_t num_blocks =
      at_most(schedule.num_blocks, at_most(all_steps / kLeastStepsOfPart, int64_t{num_tiles} * kMaxParts));
  num_blocks = num_tiles > 0 && num_blocks == 0 ? 1 : num_blocks;
  if (block >= num_blocks)
    return;
  const auto block_of = [&](int64_t step) { return static_cast<int>(((step + 1) * num_blocks - 1) / all_steps); };
  const int64_t end = (block + 1) * all_steps / num_blocks;
  for (int64_t step = block * all_steps / num_blocks; step < end;) {
    const int64_t tile_begin = step / num_steps * num_steps;
    WorkItem work = schedule.whole_tile(lone_thread_value(static_cast<int>(step / num_steps)));
    work.first_step = lone_thread_value(static_cast<int>(step - tile_begin));
    work.last_step = lone_thread_value(static_cast<int>(at_most(end - tile_begin, num_steps)));
    if (work.last_step - work.first_step < num_steps) {
      work.first_block = block_of(tile_begin);
      work.part = block - work.first_block;
      work.num_parts = block_of(tile_begin + num_steps - 1) - work.first_block + 1;
    }
    fn(work);
    step = tile_begin + work.last_step;
  }
}

/// Place in the ring of stages. The consumers of a stage wait for the end of its full barrier's phase of this parity,
/// the producer for the end of its empty barrier's phase of the other.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;

  ZEXPERT_HOST_DEVICE void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1U;
    }
  }
};

}  // namespace zexpert::cuda
