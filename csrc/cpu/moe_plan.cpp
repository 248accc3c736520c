#include "zexpert/moe_plan.h"

#include <algorithm>
#include <vector>

#include "cpu/index_range.h"
#include "zexpert/error.h"
#include "zexpert/parallel.h"

namespace zexpert {
namespace {

/// A block of slots worth a thread. Blocks are cut by the input's size alone; the sort is stable, so that where they
/// are cut shows in no result.
constexpr int64_t kBlockSlots = 16384;
constexpr int64_t kMaxBlocks = 64;

struct Block {
  int64_t begin, end;
  int32_t* next_row;  ///< [num_experts]: slots per expert, then the row of the expert's next slot
};

template <typename Id>
void count_slots(const Id* topk_ids, const Block& block) {
  for (int64_t slot = block.begin; slot < block.end; ++slot) {
    if (topk_ids[slot] >= 0) {
      ++block.next_row[topk_ids[slot]];
    }
  }
}

/// Turns the blocks' counts into their first rows: expert after expert, within an expert block after block.
void find_first_rows(const std::vector<Block>& blocks, int64_t num_experts, int32_t* expert_offsets) {
  int32_t row = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    expert_offsets[expert] = row;
    for (const Block& block : blocks) {
      const int32_t count = block.next_row[expert];
      block.next_row[expert] = row;
      row += count;
    }
  }
  expert_offsets[num_experts] = row;
}

template <typename Id>
void place_slots(const Id* topk_ids, const Block& block, int32_t* row_slots, int32_t* slot_rows) {
  for (int64_t slot = block.begin; slot < block.end; ++slot) {
    if (topk_ids[slot] >= 0) {
      const int32_t row = block.next_row[topk_ids[slot]]++;
      row_slots[row] = static_cast<int32_t>(slot);
      slot_rows[slot] = row;
    } else {
      slot_rows[slot] = -1;
    }
  }
}

template <typename Id>
void moe_plan(const MoePlanParams& params) {
  const auto* topk_ids = static_cast<const Id*>(params.topk_ids);
  const int64_t bad = find_out_of_range(topk_ids, params.num_slots, -1, params.num_experts);
  ZEXPERT_CHECK(bad < 0, "topk_ids must lie in [-1, ", params.num_experts, "), got ", topk_ids[bad]);

  // Blocks of at least as many slots as there are experts keep the counts smaller than the ids.
  const int64_t least_slots = std::max(kBlockSlots, params.num_experts);
  const int64_t num_blocks = std::clamp<int64_t>(params.num_slots / least_slots, 1, kMaxBlocks);
  std::vector<int32_t> next_rows(static_cast<size_t>(num_blocks * params.num_experts));
  std::vector<Block> blocks;
  for (int64_t b = 0; b < num_blocks; ++b) {
    blocks.push_back({params.num_slots * b / num_blocks, params.num_slots * (b + 1) / num_blocks,
                      next_rows.data() + b * params.num_experts});
  }
  parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) count_slots(topk_ids, blocks[static_cast<size_t>(b)]);
  });
  find_first_rows(blocks, params.num_experts, params.expert_offsets);
  parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      place_slots(topk_ids, blocks[static_cast<size_t>(b)], params.row_slots, params.slot_rows);
    }
  });
  std::fill(params.row_slots + params.expert_offsets[params.num_experts], params.row_slots + params.num_slots, -1);
}

}  // namespace

void moe_plan_cpu(const MoePlanParams& params) {
  if (params.ids_type == ScalarType::kInt64) {
    moe_plan<int64_t>(params);
  } else {
    moe_plan<int32_t>(params);
  }
}

}  // namespace zexpert
