// SPDX-License-Identifier: Apache-2.0
#include "zexpert/biased_topk_and_plan.h"

#include <gtest/gtest.h>

#include "testing.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

/// A routing with its plan, and the memory for all that it writes.
struct Call {
  Call(const std::vector<float>& given, int64_t num_tokens) : logits(given), slots(num_tokens * 3) {
    BiasedTopKParams& routing = params.routing;
    routing.spec.top_k = 3;
    routing.spec.num_real_experts = 6;
    routing.spec = routing.spec.for_width(9);
    routing.logits = this->logits.data();
    routing.logits_row_stride = 9;
    routing.topk_weights = weights.data();
    routing.zero_weight = weights.data() + slots;
    routing.topk_ids = ids.data();
    routing.num_tokens = num_tokens;
    params.expert_offsets = plan.data();
    params.row_slots = plan.data() + 7;
    params.slot_rows = params.row_slots + slots;
  }

  std::vector<float> logits;
  int64_t slots;
  std::vector<float> weights = std::vector<float>(static_cast<size_t>(slots + slots / 3));
  std::vector<int32_t> ids = std::vector<int32_t>(static_cast<size_t>(slots));
  std::vector<int32_t> plan = std::vector<int32_t>(static_cast<size_t>(7 + 2 * slots), 99);
  BiasedTopKAndPlanParams params;
};

TEST(BiasedTopKAndPlan, IsTheTwoOneAfterTheOther) {
  Random random;
  for (const int64_t num_tokens : {0, 1, 40}) {
    const std::vector<float> logits = random.normal<float>(num_tokens * 9);
    Call together(logits, num_tokens);
    biased_topk_and_plan_cpu(together.params);
    Call apart(logits, num_tokens);
    biased_topk_cpu(apart.params.routing);
    moe_plan_cpu(apart.params.plan());
    EXPECT_EQ(together.weights, apart.weights);
    EXPECT_EQ(together.ids, apart.ids);
    EXPECT_EQ(together.plan, apart.plan);
    EXPECT_EQ(together.plan[0], 0);
  }
}

TEST(BiasedTopKAndPlan, ThePlanIsOfTheRoutingsIds) {
  Call call(std::vector<float>(18), 2);
  call.params.routing.ids_type = ScalarType::kInt64;
  const MoePlanParams plan = call.params.plan();
  EXPECT_EQ(plan.topk_ids, call.ids.data());
  EXPECT_EQ(plan.ids_type, ScalarType::kInt64);
  EXPECT_EQ(plan.num_slots, 6);
  EXPECT_EQ(plan.num_experts, 6);
}

}  // namespace
}  // namespace zexpert
