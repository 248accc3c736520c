// SPDX-License-Identifier: Apache-2.0
#include "zexpert/kernel_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <string>

#include "zexpert/biased_topk.h"
#include "zexpert/cpu_capability.h"
#include "zexpert/error.h"
#include "zexpert/grouped_mlp.h"
#include "zexpert/moe_plan.h"

namespace zexpert {
namespace {

KernelQuery query_for(const char* op) {
  KernelQuery query;
  query.op = op;
  return query;
}

KernelQuery grouped_mlp_query(int64_t num_rows, int64_t num_experts) {
  KernelQuery query = query_for("grouped_mlp");
  query.num_rows = num_rows;
  query.num_experts = num_experts;
  return query;
}

std::string error_of(const KernelQuery& query) {
  try {
    kernel_plan(query);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(KernelPlan, NamesTheInstructionSetInUse) {
  std::string isa = name(cpu_capability());
  std::transform(isa.begin(), isa.end(), isa.begin(), [](unsigned char c) { return std::tolower(c); });
  for (const char* op : {"biased_topk", "zero_expert_accumulate", "silu_and_mul", "moe_finalize"}) {
    const KernelPlan plan = kernel_plan(query_for(op));
    EXPECT_EQ(plan.op, op);
    EXPECT_EQ(plan.backend, "cpu");
    EXPECT_EQ(plan.kernel, std::string(op) + "_" + isa);
  }
}

TEST(KernelPlan, IntegerAndCopyKernelsKnowNoInstructionSet) {
  EXPECT_EQ(kernel_plan(query_for("moe_plan")).kernel, "counting_sort");
  EXPECT_EQ(kernel_plan(query_for("moe_permute")).kernel, "row_copy");
}

TEST(KernelPlan, ChoiceAndPlanAreOneLaunchForFewTokensOnHopperAndBlackwell) {
  KernelQuery query = query_for("biased_topk_and_plan");
  query.device = "cuda";
  query.num_tokens = kMaxPlannedTokens;
  query.num_experts = 768;
  query.top_k = 12;
  for (const int64_t major : {8, 9, 10, 12}) {
    query.compute_capability = major;
    EXPECT_EQ(kernel_plan(query).kernel,
              major == 9 || major == 10 ? "biased_topk_and_plan" : "biased_topk_warp, counting_sort");
  }
  query.compute_capability = 9;
  query.num_tokens = kMaxPlannedTokens + 1;
  EXPECT_EQ(kernel_plan(query).kernel, "biased_topk_warp, counting_sort");
}

TEST(KernelPlan, SaysHowManyBlocksPlan) {
  KernelQuery query = query_for("moe_plan");
  query.device = "cuda";
  query.top_k = 8;
  for (const int64_t num_tokens : {1, 256, 257, 100000}) {
    query.num_tokens = num_tokens;
    const int64_t num_blocks = moe_plan_cuda_num_blocks(num_tokens * 8);
    EXPECT_EQ(kernel_plan(query).reason,
              "The slots are counted and placed on the device by " +
                  (num_blocks == 1 ? "one block." : std::to_string(num_blocks) + " blocks."));
  }
}

int64_t few_rows() { return few_rows_limit(ScalarType::kFloat32, cpu_capability()); }

TEST(KernelPlan, GroupedMlpStreamsSegmentsOfFewRows) {
  EXPECT_EQ(kernel_plan(grouped_mlp_query(0, 8)).backend, "cpu");
  EXPECT_EQ(kernel_plan(grouped_mlp_query(8 * few_rows(), 8)).backend, "cpu");
  EXPECT_EQ(kernel_plan(grouped_mlp_query(8 * few_rows() + 1, 8)).backend, "torch");
}

TEST(KernelPlan, TokensTimesTopKStandForRows) {
  KernelQuery query = query_for("grouped_mlp");
  query.num_experts = 8;
  query.num_tokens = 4;
  query.top_k = 2 * few_rows();
  EXPECT_EQ(kernel_plan(query).backend, "cpu");
  query.num_tokens = 5;
  EXPECT_EQ(kernel_plan(query).backend, "torch");
}

TEST(KernelPlan, RefusesWhatItDoesNotKnow) {
  EXPECT_NE(error_of(query_for("top_k")).find("op must be \"biased_topk\", "), std::string::npos);

  KernelQuery query = query_for("biased_topk");
  query.device = "tpu";
  EXPECT_EQ(error_of(query), "device must be \"cpu\" or \"cuda\", got \"tpu\"");

  query = query_for("biased_topk");
  query.dtype = "int8";
  EXPECT_EQ(error_of(query), "dtype must be \"float32\", \"float64\", \"bfloat16\" or \"float16\", got \"int8\"");

  query = query_for("moe_plan");
  query.dtype = "float32";
  EXPECT_EQ(error_of(query), "dtype (of moe_plan's ids) must be \"int32\" or \"int64\", got \"float32\"");
}

TEST(KernelPlan, RefusesSizesThatAreMissingOrOutOfRange) {
  EXPECT_EQ(error_of(query_for("grouped_mlp")),
            "grouped_mlp chooses its kernel by rows per expert: num_experts must be given");
  EXPECT_EQ(error_of(grouped_mlp_query(1, 0)), "num_experts must be at least 1, got 0");
  EXPECT_EQ(error_of(grouped_mlp_query(-1, 1)), "num_rows must be at least 0, got -1");

  KernelQuery query = grouped_mlp_query(0, 8);
  query.num_rows.reset();
  EXPECT_EQ(error_of(query),
            "grouped_mlp chooses its kernel by rows per expert: num_rows, or num_tokens and top_k, must be given");
}

}  // namespace
}  // namespace zexpert
