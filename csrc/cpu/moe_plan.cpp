#include "zexpert/moe_plan.h"

#include <algorithm>
#include <vector>

#include "cpu/index_range.h"
#include "zexpert/error.h"
#include "zexpert/parallel.h"

namespace zexpert {
namespace {

template <typename Id>
void plan(const MoePlanParams& params) {
  const auto* topk_ids = static_cast<const Id*>(params.topk_ids);
  const int64_t bad = find_out_of_range(topk_ids, params.num_slots, -1, params.num_experts);
  ZEXPERT_CHECK(bad < 0, "topk_ids must lie in [-1, ", params.num_experts, "), got ", topk_ids[bad]);
  std::vector<int32_t> next(static_cast<size_t>(params.num_experts) + 1);
  for (int64_t slot = 0; slot < params.num_slots; ++slot) {
    if (topk_ids[slot] >= 0) {
      ++next[static_cast<size_t>(topk_ids[slot]) + 1];
    }
  }
  for (size_t expert = 0; expert + 1 < next.size(); ++expert) {
    next[expert + 1] += next[expert];
  }
  std::copy(next.begin(), next.end(), params.expert_offsets);
  for (int64_t slot = 0; slot < params.num_slots; ++slot) {
    int32_t row = -1;
    if (topk_ids[slot] >= 0) {
      row = next[static_cast<size_t>(topk_ids[slot])]++;
      params.row_slots[row] = static_cast<int32_t>(slot);
    }
    params.slot_rows[slot] = row;
  }
  std::fill(params.row_slots + params.expert_offsets[params.num_experts], params.row_slots + params.num_slots, -1);
}

}  // namespace

void moe_plan_cpu(const MoePlanParams& params) {
  if (params.ids_type == ScalarType::kInt64) {
    plan<int64_t>(params);
  } else {
    plan<int32_t>(params);
  }
}

}  // namespace zexpert
