// SPDX-License-Identifier: Apache-2.0
// biased_topk_cpu with the plan of its choice.

#include <gtest/gtest.h>

#include "testing.h"
#include "zexpert/biased_topk.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

/// A routing with its plan, and the memory for all that it writes.
struct Call {
  Call(const std::vector<float>& given, int64_t num_tokens) : logits(given), slots(num_tokens * 3) {
    params.spec.top_k = 3;
    params.spec.num_real_experts = 6;
    params.spec = params.spec.for_width(9);
    params.logits = this->logits.data();
    params.logits_row_stride = 9;
    params.topk_weights = weights.data();
    params.zero_weight = weights.data() + slots;
    params.topk_ids = ids.data();
    params.num_tokens = num_tokens;
    params.expert_offsets = plan.data();
    params.row_slots = plan.data() + 7;
    params.slot_rows = params.row_slots + slots;
  }

  std::vector<float> logits;
  int64_t slots;
  std::vector<float> weights = std::vector<float>(static_cast<size_t>(slots + slots / 3));
  std::vector<int32_t> ids = std::vector<int32_t>(static_cast<size_t>(slots));
  std::vector<int32_t> plan = std::vector<int32_t>(static_cast<size_t>(7 + 2 * slots), 99);
  BiasedTopKParams params;
};

TEST(BiasedTopKAndPlan, IsTheTwoOneAfterTheOther) {
  Random random;
  for (const int64_t num_tokens : {0, 1, 40}) {
    const std::vector<float> logits = random.normal<float>(num_tokens * 9);
    Call together(logits, num_tokens);
    biased_topk_cpu(together.params);
    Call apart(logits, num_tokens);
    BiasedTopKParams routing = apart.params;
    routing.expert_offsets = routing.row_slots = routing.slot_rows = nullptr;
    biased_topk_cpu(routing);
    EXPECT_EQ(apart.plan, std::vector<int32_t>(apart.plan.size(), 99));  // nullable outputs: no plan
    moe_plan_cpu(apart.params.plan());
    EXPECT_EQ(together.weights, apart.weights);
    EXPECT_EQ(together.ids, apart.ids);
    EXPECT_EQ(together.plan, apart.plan);
    EXPECT_EQ(together.plan[0], 0);
  }
}

TEST(BiasedTopKAndPlan, ThePlanIsOfTheRoutingsIds) {
  Call call(std::vector<float>(18), 2);
  call.params.ids_type = ScalarType::kInt64;
  const MoePlanParams plan = call.params.plan();
  EXPECT_EQ(plan.topk_ids, call.ids.data());
  EXPECT_EQ(plan.ids_type, ScalarType::kInt64);
  EXPECT_EQ(plan.num_slots, 6);
  EXPECT_EQ(plan.num_experts, 6);
}

TEST(BiasedTopKAndPlan, APlanNeedsAllItsArrays) {
  for (auto array : {&BiasedTopKParams::expert_offsets, &BiasedTopKParams::row_slots, &BiasedTopKParams::slot_rows}) {
    Call call(std::vector<float>(18), 2);
    call.params.*array = nullptr;
    const char* const missed = array == &BiasedTopKParams::expert_offsets ? "expert_offsets"
                               : array == &BiasedTopKParams::row_slots    ? "row_slots"
                                                                          : "slot_rows";
    EXPECT_EQ(error_of([&] { biased_topk_cpu(call.params); }), std::string(missed) + " must not be null");
    EXPECT_EQ(call.weights, std::vector<float>(call.weights.size()));
    EXPECT_EQ(call.plan, std::vector<int32_t>(call.plan.size(), 99));
  }
}

TEST(BiasedTopKAndPlan, ScratchIsForSlotsOfManyBlocksOnCudaAlone) {
  Call call(std::vector<float>(18), 2);
  EXPECT_EQ(biased_topk_cpu_workspace_bytes(call.params), 0);
  EXPECT_EQ(biased_topk_cuda_workspace_bytes(call.params), 0);
  call.params.num_tokens = 1000;  // 3000 slots, 2 blocks
  EXPECT_EQ(biased_topk_cpu_workspace_bytes(call.params), 0);
  EXPECT_EQ(biased_topk_cuda_workspace_bytes(call.params), 2 * 6 * 4);
  call.params.expert_offsets = call.params.row_slots = call.params.slot_rows = nullptr;
  EXPECT_EQ(biased_topk_cuda_workspace_bytes(call.params), 0);
}

}  // namespace
}  // namespace zexpert
