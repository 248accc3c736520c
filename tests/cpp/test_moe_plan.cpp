// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "testing.h"

namespace zexpert {
namespace {

using namespace zexpert::testing;

constexpr int32_t kSentinel = 0x5a5a5a5a;

struct Plan {
  std::vector<int32_t> expert_offsets, row_slots, slot_rows;
  bool operator==(const Plan& other) const {
    return expert_offsets == other.expert_offsets && row_slots == other.row_slots && slot_rows == other.slot_rows;
  }
};

/// The plan by a stable sort of the slots.
template <typename Id>
Plan sorted_plan(const std::vector<Id>& topk_ids, int64_t num_experts) {
  Plan plan;
  for (size_t slot = 0; slot < topk_ids.size(); ++slot) {
    if (topk_ids[slot] >= 0) {
      plan.row_slots.push_back(static_cast<int32_t>(slot));
    }
  }
  const auto id = [&](int32_t slot) { return topk_ids[static_cast<size_t>(slot)]; };
  std::stable_sort(plan.row_slots.begin(), plan.row_slots.end(), [&](int32_t a, int32_t b) { return id(a) < id(b); });
  for (int64_t expert = 0; expert <= num_experts; ++expert) {
    plan.expert_offsets.push_back(static_cast<int32_t>(
        std::count_if(plan.row_slots.begin(), plan.row_slots.end(), [&](int32_t slot) { return id(slot) < expert; })));
  }
  plan.slot_rows.assign(topk_ids.size(), -1);
  for (size_t row = 0; row < plan.row_slots.size(); ++row) {
    plan.slot_rows[static_cast<size_t>(plan.row_slots[row])] = static_cast<int32_t>(row);
  }
  plan.row_slots.resize(topk_ids.size(), -1);
  return plan;
}

template <typename Id>
Plan make_plan(const std::vector<Id>& topk_ids, int64_t num_experts, Plan plan = {}) {
  plan.expert_offsets.resize(static_cast<size_t>(num_experts) + 1, kSentinel);
  plan.row_slots.resize(topk_ids.size(), kSentinel);
  plan.slot_rows.resize(topk_ids.size(), kSentinel);
  MoePlanParams params;
  params.topk_ids = topk_ids.data();
  params.ids_type = sizeof(Id) == 8 ? ScalarType::kInt64 : ScalarType::kInt32;
  params.expert_offsets = plan.expert_offsets.data();
  params.row_slots = plan.row_slots.data();
  params.slot_rows = plan.slot_rows.data();
  params.num_slots = static_cast<int64_t>(topk_ids.size());
  params.num_experts = num_experts;
  moe_plan_cpu(params);
  return plan;
}

template <typename Id>
class MoePlan : public ::testing::Test {};
using IdTypes = ::testing::Types<int32_t, int64_t>;
TYPED_TEST_SUITE(MoePlan, IdTypes);

TYPED_TEST(MoePlan, IsAStableSort) {
  using Id = TypeParam;
  Random random;
  for (const Id num_experts : {1, 2, 7, 64, 512}) {
    for (const int64_t num_slots : {1, 7, 84, 1001}) {
      const auto topk_ids = random.integers<Id>(num_slots, -1, num_experts - 1);
      EXPECT_TRUE(make_plan(topk_ids, num_experts) == sorted_plan(topk_ids, num_experts))
          << num_slots << " slots, " << num_experts << " experts";
    }
  }
}

TYPED_TEST(MoePlan, NoSlots) {
  EXPECT_EQ(make_plan(std::vector<TypeParam>{}, 3).expert_offsets, (std::vector<int32_t>{0, 0, 0, 0}));
}

TYPED_TEST(MoePlan, NoSlotDoesWork) {
  const Plan plan = make_plan(std::vector<TypeParam>(24, -1), 2);
  EXPECT_EQ(plan.expert_offsets, (std::vector<int32_t>{0, 0, 0}));
  EXPECT_EQ(plan.row_slots, std::vector<int32_t>(24, -1));
  EXPECT_EQ(plan.slot_rows, std::vector<int32_t>(24, -1));
}

TYPED_TEST(MoePlan, OneExpertTakesAll) {
  const Plan plan = make_plan(std::vector<TypeParam>(500, 3), 6);
  EXPECT_EQ(plan.expert_offsets, (std::vector<int32_t>{0, 0, 0, 0, 500, 500, 500}));
  std::vector<int32_t> ascending(500);
  std::iota(ascending.begin(), ascending.end(), 0);
  EXPECT_EQ(plan.row_slots, ascending);
  EXPECT_EQ(plan.slot_rows, ascending);
}

TYPED_TEST(MoePlan, LargeInputsOnAnyNumberOfThreads) {
  using Id = TypeParam;
  Random random;
  for (const Id num_experts : {3, 896, 50000}) {
    auto topk_ids = random.integers<Id>(300007, -1, num_experts - 1);
    std::fill(topk_ids.begin() + 100000, topk_ids.begin() + 150000, Id{1});
    const Plan expected = sorted_plan(topk_ids, std::min<Id>(num_experts, 896));
    for (const int64_t threads : {1, 2, 5}) {
      const ScopedThreads scope(threads);
      const Plan plan = make_plan(topk_ids, num_experts);
      EXPECT_TRUE(plan.row_slots == expected.row_slots && plan.slot_rows == expected.slot_rows)
          << num_experts << " experts, " << threads << " threads";
      EXPECT_TRUE(
          std::equal(expected.expert_offsets.begin(), expected.expert_offsets.end(), plan.expert_offsets.begin()));
    }
  }
}

TYPED_TEST(MoePlan, RefusesIdsOutOfRangeAndWritesNothing) {
  using Id = TypeParam;
  for (const int64_t num_slots : {24, 300007}) {
    for (const Id bad : {Id{512}, Id{700}, Id{-2}, std::numeric_limits<Id>::max(), std::numeric_limits<Id>::min()}) {
      std::vector<Id> topk_ids(static_cast<size_t>(num_slots), Id{511});
      topk_ids[static_cast<size_t>(num_slots) - 2] = bad;
      topk_ids.back() = Id{-3};
      Plan plan;
      plan.expert_offsets.assign(513, kSentinel);
      plan.row_slots.assign(topk_ids.size(), kSentinel);
      plan.slot_rows.assign(topk_ids.size(), kSentinel);
      MoePlanParams params;
      params.topk_ids = topk_ids.data();
      params.ids_type = sizeof(Id) == 8 ? ScalarType::kInt64 : ScalarType::kInt32;
      params.expert_offsets = plan.expert_offsets.data();
      params.row_slots = plan.row_slots.data();
      params.slot_rows = plan.slot_rows.data();
      params.num_slots = num_slots;
      params.num_experts = 512;
      EXPECT_EQ(error_of([&] { moe_plan_cpu(params); }), "topk_ids must be in [-1, 512), got " + std::to_string(bad));
      for (const auto* written : {&plan.expert_offsets, &plan.row_slots, &plan.slot_rows}) {
        EXPECT_EQ(std::count(written->begin(), written->end(), kSentinel), static_cast<int64_t>(written->size()));
      }
    }
  }
}

}  // namespace
}  // namespace zexpert
