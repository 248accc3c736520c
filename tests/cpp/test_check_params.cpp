// SPDX-License-Identifier: Apache-2.0
// What every CPU operator says of a size below 0 and of an array that is missing, before it touches anything.
#include "cpu/check_params.h"

#include <gtest/gtest.h>

#include <array>
#include <string>

#include "zexpert/biased_topk.h"
#include "zexpert/error.h"
#include "zexpert/grouped_mlp.h"
#include "zexpert/moe_finalize.h"
#include "zexpert/moe_permute.h"
#include "zexpert/moe_plan.h"
#include "zexpert/silu_and_mul.h"
#include "zexpert/zero_expert_accumulate.h"
#include "zexpert/zero_idle.h"

namespace zexpert {
namespace {

template <typename Params>
std::string error_of(void (*op)(const Params&), const Params& params) {
  try {
    op(params);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(CheckParams, NothingToDoNeedsNoArrays) {
  BiasedTopKBackwardParams routing;
  routing.spec = routing.spec.for_width(2);
  EXPECT_EQ(error_of(&biased_topk_backward_cpu, routing), "");
  EXPECT_EQ(error_of(&moe_finalize_cpu, {}), "");
  EXPECT_EQ(error_of(&moe_finalize_backward_cpu, {}), "");
  EXPECT_EQ(error_of(&moe_permute_cpu, {}), "");
  EXPECT_EQ(error_of(&moe_permute_backward_cpu, {}), "");
  EXPECT_EQ(error_of(&silu_and_mul_cpu, {}), "");
  EXPECT_EQ(error_of(&silu_and_mul_backward_cpu, {}), "");
  EXPECT_EQ(error_of(&zero_expert_accumulate_cpu, {}), "");
  EXPECT_EQ(error_of(&zero_expert_accumulate_backward_cpu, {}), "");
}

/// Sets one size to -1 after another, then, all sizes being 1, says which array is missed first.
template <typename Params, size_t kSizes>
void expect_checks(void (*op)(const Params&), Params params,
                   const std::array<std::pair<const char*, int64_t Params::*>, kSizes>& sizes,
                   const std::string& first_missed) {
  for (const auto& [name, size] : sizes) {
    Params negative = params;
    negative.*size = -1;
    EXPECT_EQ(error_of(op, negative), std::string(name) + " must not be negative, got -1");
    params.*size = 1;
  }
  EXPECT_EQ(error_of(op, params), first_missed + " must not be null");
}

#define SIZE(Params, name) \
  std::pair<const char*, int64_t Params::*> { #name, &Params::name }

TEST(CheckParams, BiasedTopKBackward) {
  using P = BiasedTopKBackwardParams;
  P params;
  params.spec.num_constant_experts = 1;
  EXPECT_EQ(error_of(&biased_topk_backward_cpu, params),
            "spec must be resolved by RoutingSpec::for_width, got an open count of experts");
  params.spec = params.spec.for_width(2);
  expect_checks(&biased_topk_backward_cpu, params, std::array{SIZE(P, num_tokens)}, "grad_topk_weights");
  const float value = 0.0F;
  float grad_logit = -7.0F;
  params.num_tokens = 1;
  params.logits = params.grad_topk_weights = params.grad_zero_weight = &value;
  params.grad_logits = &grad_logit;
  EXPECT_EQ(error_of(&biased_topk_backward_cpu, params), "grad_constant_weight must not be null");
  EXPECT_EQ(grad_logit, -7.0F);
}

TEST(CheckParams, MoePlan) {
  using P = MoePlanParams;
  expect_checks(&moe_plan_cpu, P{}, std::array{SIZE(P, num_slots), SIZE(P, num_experts)}, "expert_offsets");
  std::array<int32_t, 2> offsets{-7, -7};
  P params;
  params.expert_offsets = offsets.data();
  params.num_slots = params.num_experts = 1;
  EXPECT_EQ(error_of(&moe_plan_cpu, params), "topk_ids must not be null");
  EXPECT_EQ(offsets[0], -7);
}

TEST(CheckParams, GroupedMlp) {
  using P = GroupedMlpParams;
  const auto op = +[](const P& params) { grouped_mlp_cpu(params); };
  expect_checks(op, P{},
                std::array{SIZE(P, num_rows), SIZE(P, num_tokens), SIZE(P, top_k), SIZE(P, num_experts),
                           SIZE(P, hidden_size), SIZE(P, intermediate_size)},
                "expert_offsets");
  const std::array<int32_t, 2> offsets{0, 1};
  P params;
  params.expert_offsets = offsets.data();
  params.num_rows = params.num_experts = params.hidden_size = 1;
  EXPECT_EQ(error_of(op, params), "rows must not be null");
  const float value = 1.0F;
  float out = -7.0F;
  params.rows = &value;
  params.out = &out;
  params.intermediate_size = 1;
  EXPECT_EQ(error_of(op, params), "w13_weight must not be null");
  params.w13_weight = params.w2_weight = &value;
  params.data_type = ScalarType::kInt32;
  EXPECT_EQ(error_of(op, params), "data must be of a floating type, got int32");
  const int32_t slot = 0;
  params.row_slots = &slot;
  params.top_k = 0;
  EXPECT_EQ(error_of(op, params), "top_k must be at least 1, got 0");
  params.row_slots = nullptr;
  params.data_type = ScalarType::kFloat32;
  params.tile_rows = 8;
  EXPECT_EQ(error_of(op, params), "tile_rows must be 0 on the CPU, got 8");
  EXPECT_EQ(out, -7.0F);
}

TEST(CheckParams, ZeroIdleExperts) {
  using P = ZeroIdleExpertsParams;
  EXPECT_EQ(error_of(&zero_idle_experts_cpu, {}), "");
  expect_checks(&zero_idle_experts_cpu, P{}, std::array{SIZE(P, num_experts), SIZE(P, expert_size)}, "data");
}

TEST(CheckParams, ZeroIdleRows) {
  using P = ZeroIdleRowsParams;
  EXPECT_EQ(error_of(&zero_idle_rows_cpu, {}), "");
  expect_checks(&zero_idle_rows_cpu, P{}, std::array{SIZE(P, num_rows), SIZE(P, row_size)}, "data");
}

TEST(CheckParams, MoeFinalize) {
  using P = MoeFinalizeParams;
  expect_checks(&moe_finalize_cpu, P{},
                std::array{SIZE(P, num_rows), SIZE(P, num_tokens), SIZE(P, top_k), SIZE(P, num_constant_experts),
                           SIZE(P, hidden_size)},
                "slot_rows");
  const int32_t slot_row = -1;
  const float weight = 1.0F;
  float out = 0.0F;
  P params;
  params.num_tokens = params.top_k = params.hidden_size = 1;
  params.slot_rows = &slot_row;
  params.topk_weights = params.zero_weight = &weight;
  EXPECT_EQ(error_of(&moe_finalize_cpu, params), "hidden_states must not be null");
  params.hidden_states = &weight;
  params.out = &out;
  EXPECT_EQ(error_of(&moe_finalize_cpu, params), "");  // without rows, none are needed
  EXPECT_EQ(out, 1.0F);
  params.num_constant_experts = 1;
  EXPECT_EQ(error_of(&moe_finalize_cpu, params), "constant_weight must not be null");
  params.num_constant_experts = 0;
  params.zero_weight = params.hidden_states = nullptr;
  EXPECT_EQ(error_of(&moe_finalize_cpu, params), "");  // without a zero part neither is needed
  EXPECT_EQ(out, 0.0F);
  params.num_tokens = 2;
  EXPECT_EQ(error_of(&moe_finalize_cpu, params), "out_row_stride must be at least hidden_size (1), got 0");
}

TEST(CheckParams, MoeFinalizeBackward) {
  using P = MoeFinalizeBackwardParams;
  expect_checks(&moe_finalize_backward_cpu, P{},
                std::array{SIZE(P, num_rows), SIZE(P, num_tokens), SIZE(P, top_k), SIZE(P, hidden_size)}, "slot_rows");
  float value = 0.0F;
  P params;
  params.num_rows = params.num_tokens = params.hidden_size = 1;
  params.grad_out = params.rows = params.hidden_states = &value;
  params.grad_rows = params.grad_hidden_states = params.grad_zero_weight = &value;
  EXPECT_EQ(error_of(&moe_finalize_backward_cpu, params), "zero_weight must not be null");
  params.zero_weight = &value;
  EXPECT_EQ(error_of(&moe_finalize_backward_cpu, params), "workspace must not be null");
}

TEST(CheckParams, MoePermute) {
  using P = MoePermuteParams;
  expect_checks(&moe_permute_cpu, P{},
                std::array{SIZE(P, num_rows), SIZE(P, num_tokens), SIZE(P, top_k), SIZE(P, hidden_size)}, "row_slots");
}

/// Each operator, with a type that holds no floating numbers.
template <typename Params>
void expect_refuses_integers(void (*op)(const Params&)) {
  Params params;
  params.data_type = ScalarType::kInt32;
  EXPECT_EQ(error_of(op, params), "data must be of a floating type, got int32");
}

TEST(CheckParams, TypesThatAreNotFloating) {
  expect_refuses_integers(&moe_finalize_cpu);
  expect_refuses_integers(&moe_finalize_backward_cpu);
  expect_refuses_integers(&moe_permute_cpu);
  expect_refuses_integers(&moe_permute_backward_cpu);
  expect_refuses_integers(&silu_and_mul_cpu);
  expect_refuses_integers(&silu_and_mul_backward_cpu);
  expect_refuses_integers(&zero_expert_accumulate_cpu);
  expect_refuses_integers(&zero_expert_accumulate_backward_cpu);
}

TEST(CheckParams, MoePermuteBackward) {
  using P = MoePermuteBackwardParams;
  expect_checks(&moe_permute_backward_cpu, P{},
                std::array{SIZE(P, num_rows), SIZE(P, num_tokens), SIZE(P, top_k), SIZE(P, hidden_size)}, "row_slots");
}

TEST(CheckParams, SiluAndMul) {
  using P = SiluAndMulParams;
  expect_checks(&silu_and_mul_cpu, P{}, std::array{SIZE(P, num_rows), SIZE(P, intermediate_size)}, "gate_up");
}

TEST(CheckParams, SiluAndMulBackward) {
  using P = SiluAndMulBackwardParams;
  expect_checks(&silu_and_mul_backward_cpu, P{}, std::array{SIZE(P, num_rows), SIZE(P, intermediate_size)}, "grad_out");
}

TEST(CheckParams, ZeroExpertAccumulate) {
  using P = ZeroExpertAccumulateParams;
  expect_checks(&zero_expert_accumulate_cpu, P{}, std::array{SIZE(P, num_tokens), SIZE(P, hidden_size)},
                "hidden_states");
}

TEST(CheckParams, ZeroExpertAccumulateBackward) {
  using P = ZeroExpertAccumulateBackwardParams;
  expect_checks(&zero_expert_accumulate_backward_cpu, P{}, std::array{SIZE(P, num_tokens), SIZE(P, hidden_size)},
                "grad_zero_weight");
}

}  // namespace
}  // namespace zexpert
