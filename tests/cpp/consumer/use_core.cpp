// The kernels alone: a plan for three slots of which one does no work.
#include <cstdint>
#include <cstdio>
#include <vector>

#include "zexpert/error.h"
#include "zexpert/kernel_plan.h"
#include "zexpert/moe_plan.h"

int main() {
  const std::vector<int32_t> topk_ids = {1, -1, 0};
  std::vector<int32_t> expert_offsets(3), row_slots(3), slot_rows(3);

  zexpert::MoePlanParams params;
  params.topk_ids = topk_ids.data();
  params.expert_offsets = expert_offsets.data();
  params.row_slots = row_slots.data();
  params.slot_rows = slot_rows.data();
  params.num_slots = 3;
  params.num_experts = 2;
  zexpert::moe_plan_cpu(params);
  const bool planned = expert_offsets == std::vector<int32_t>{0, 1, 2} && row_slots == std::vector<int32_t>{2, 0, -1} &&
                       slot_rows == std::vector<int32_t>{1, -1, 0};

  bool refused = false;
  try {
    params.num_experts = 1;
    zexpert::moe_plan_cpu(params);
  } catch (const zexpert::Error& error) {
    refused = true;
    std::printf("refused, as it must be: %s\n", error.what());
  }

  zexpert::KernelQuery query;
  query.op = "moe_plan";
  const bool explained = zexpert::kernel_plan(query).backend == "cpu";
  return planned && refused && explained ? 0 : 1;
}
