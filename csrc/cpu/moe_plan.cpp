// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_plan.h"

#include <algorithm>
#include <vector>

#include "cpu/index_range.h"
#include "zexpert/error.h"
#include "zexpert/parallel.h"

namespace zexpert {
namespace {

/// A block of at least this many slots is worth a thread. Blocks depend on the size of the input alone. The sort is
/// stable, so the result does not depend on the blocks.
constexpr int64_t kBlockSlots = 16384;
constexpr int64_t kMaxBlocks = 64;

struct Block {
  int64_t begin, end;
  int32_t* next_row;  ///< [num_experts + 1]: slots per bucket, then the row of the bucket's next slot
};

/// Slots that do no work go to a bucket after the experts' buckets: a branch on the id would be mispredicted.
template <typename Id>
size_t bucket_of(Id id, int64_t num_experts) {
  return static_cast<size_t>(id >= 0 ? static_cast<int64_t>(id) : num_experts);
}

template <typename Id>
void count_slots(const Id* topk_ids, int64_t num_experts, const Block& block) {
  for (int64_t slot = block.begin; slot < block.end; ++slot) ++block.next_row[bucket_of(topk_ids[slot], num_experts)];
}

/// Turns the blocks' counts into their first rows: bucket after bucket, within a bucket block after block.
void find_first_rows(const std::vector<Block>& blocks, int64_t num_experts, int32_t* expert_offsets) {
  int32_t row = 0;
  for (int64_t bucket = 0; bucket <= num_experts; ++bucket) {
    expert_offsets[bucket] = row;
    for (const Block& block : blocks) {
      const int32_t count = block.next_row[bucket];
      block.next_row[bucket] = row;
      row += count;
    }
  }
}

/// Slots that do no work are placed behind the last offset; moe_plan() overwrites them with -1.
template <typename Id>
void place_slots(const Id* topk_ids, int64_t num_experts, const Block& block, int32_t* row_slots, int32_t* slot_rows) {
  for (int64_t slot = block.begin; slot < block.end; ++slot) {
    const int32_t row = block.next_row[bucket_of(topk_ids[slot], num_experts)]++;
    row_slots[row] = static_cast<int32_t>(slot);
    slot_rows[slot] = topk_ids[slot] >= 0 ? row : -1;
  }
}

template <typename Id>
void moe_plan(const MoePlanParams& params) {
  const auto* topk_ids = static_cast<const Id*>(params.topk_ids);
  const int64_t bad = find_out_of_range(topk_ids, params.num_slots, -1, params.num_experts);
  ZEXPERT_CHECK(bad < 0, "topk_ids must be in [-1, ", params.num_experts, "), got ", topk_ids[bad]);

  // Blocks of at least as many slots as there are experts keep the counts smaller than the ids.
  const int64_t least_slots = std::max(kBlockSlots, params.num_experts);
  const int64_t num_blocks = std::clamp<int64_t>(params.num_slots / least_slots, 1, kMaxBlocks);
  const int64_t num_buckets = params.num_experts + 1;
  std::vector<int32_t> next_rows(static_cast<size_t>(num_blocks * num_buckets));
  std::vector<Block> blocks;
  for (int64_t b = 0; b < num_blocks; ++b) {
    blocks.push_back({params.num_slots * b / num_blocks, params.num_slots * (b + 1) / num_blocks,
                      next_rows.data() + b * num_buckets});
  }
  parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      count_slots(topk_ids, params.num_experts, blocks[static_cast<size_t>(b)]);
    }
  });
  find_first_rows(blocks, params.num_experts, params.expert_offsets);
  parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      place_slots(topk_ids, params.num_experts, blocks[static_cast<size_t>(b)], params.row_slots, params.slot_rows);
    }
  });
  std::fill(params.row_slots + params.expert_offsets[params.num_experts], params.row_slots + params.num_slots, -1);
}

}  // namespace

void moe_plan_cpu(const MoePlanParams& params) {
  params.validate();
  visit_index(params.ids_type, [&](auto id) { moe_plan<decltype(id)>(params); });
}

}  // namespace zexpert
