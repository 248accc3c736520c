// SPDX-License-Identifier: Apache-2.0
#include "zexpert/kernel_plan.h"

#include <algorithm>
#include <array>
#include <limits>
#include <string_view>

#include "zexpert/biased_topk.h"
#include "zexpert/cpu_capability.h"
#include "zexpert/error.h"
#include "zexpert/grouped_mlp.h"
#include "zexpert/moe_plan.h"

namespace zexpert {
namespace {

constexpr std::array<std::string_view, 8> kOps = {"biased_topk", "biased_topk_and_plan", "zero_expert_accumulate",
                                                  "moe_plan",    "moe_permute",          "silu_and_mul",
                                                  "grouped_mlp", "moe_finalize"};
constexpr std::array<std::string_view, 2> kExpertsBackends = {"auto", "hopper"};
constexpr std::array<std::string_view, 2> kDevices = {"cpu", "cuda"};
constexpr std::array<std::string_view, 4> kFloatingTypes = {"float32", "float64", "bfloat16", "float16"};
constexpr std::array<std::string_view, 2> kIndexTypes = {"int32", "int64"};

/// "a", "b" or "c"
template <size_t N>
std::string listed(const std::array<std::string_view, N>& choices) {
  std::string text;
  for (size_t i = 0; i < N; ++i) {
    text += i == 0 ? "" : (i + 1 == N ? " or " : ", ");
    text += '"';
    text += choices[i];
    text += '"';
  }
  return text;
}

template <size_t N>
void check_choice(const char* argument, const std::string& value, const std::array<std::string_view, N>& choices) {
  ZEXPERT_CHECK(std::find(choices.begin(), choices.end(), value) != choices.end(), argument, " must be ",
                listed(choices), ", got \"", value, "\"");
}

void check_size(const char* argument, std::optional<int64_t> value, int64_t least) {
  ZEXPERT_CHECK(!value || *value >= least, argument, " must be at least ", least, ", got ", *value);
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();  // so that products of two have room
  ZEXPERT_CHECK(!value || *value <= kMost, argument, " must be less than 2^31, got ", *value);
}

/// The limits of the routing operators, with their messages.
void check_routing(const KernelQuery& query) {
  const int64_t top_k = query.top_k.value_or(1);
  const int64_t num_experts = query.num_experts.value_or(top_k);
  ZEXPERT_CHECK(top_k <= kMaxTopK, "top_k must be between 1 and ", kMaxTopK, ", got ", top_k);
  ZEXPERT_CHECK(top_k <= num_experts, "top_k must be at most the number of experts (", num_experts, "), got ", top_k);
  ZEXPERT_CHECK(query.device != "cuda" || query.dtype != "float64",
                "dtype must be float32, bfloat16 or float16 on CUDA, got float64");
}

const char* instruction_set(CpuCapability capability) {
  switch (capability) {
    case CpuCapability::kAvx512: return "avx512";
    case CpuCapability::kAvx2: return "avx2";
    case CpuCapability::kDefault: return "default";
  }
  return "unknown";
}

ScalarType floating_type(std::string_view name_of_type) {
  for (const ScalarType type : {ScalarType::kFloat64, ScalarType::kBFloat16, ScalarType::kFloat16}) {
    if (name_of_type == name(type)) {
      return type;
    }
  }
  return ScalarType::kFloat32;
}

/// The rows of all experts together, from whichever sizes say it.
int64_t total_rows(const KernelQuery& query) {
  if (query.num_rows) {
    return *query.num_rows;
  }
  ZEXPERT_CHECK(query.num_tokens && query.top_k,
                "grouped_mlp chooses its kernel by rows per expert: num_rows, or num_tokens and top_k, must be given");
  return *query.num_tokens * *query.top_k;
}

KernelPlan plan_grouped_mlp(const KernelQuery& query, const char* isa) {
  ZEXPERT_CHECK(query.num_experts.has_value(),
                "grouped_mlp chooses its kernel by rows per expert: num_experts must be given");
  const int64_t rows = total_rows(query);
  const int64_t mean = (rows + *query.num_experts - 1) / *query.num_experts;
  const std::string about = std::to_string(rows) + " rows for " + std::to_string(*query.num_experts) +
                            " experts are at most " + std::to_string(mean) + " each if spread evenly, ";
  const int64_t few_rows = few_rows_limit(floating_type(query.dtype.value_or("float32")), cpu_capability());
  const std::string limit = std::to_string(few_rows);
  if (mean <= few_rows) {
    return {query.op, "cpu", std::string("grouped_mlp_") + isa,
            about + "and a segment of up to " + limit +
                " rows is bound by reading its weights, which this kernel streams."};
  }
  return {query.op, "torch", "matmul",
          about + "and a segment of more than " + limit + " rows repays a matrix-product library's packing."};
}

/// What of the query grouped_mlp_hopper does not take; empty if it takes it, on a GPU of its own.
std::string obstacle_to_hopper(const KernelQuery& query) {
  const auto not_a_multiple = [](const char* what, std::optional<int64_t> size) {
    return size.value_or(0) % kHopperSizeStep == 0 ? std::string()
                                                   : std::string(what) + " " + std::to_string(*size) +
                                                         ", no multiple of " + std::to_string(kHopperSizeStep);
  };
  const std::string dtype = query.dtype.value_or("float32");
  if (dtype != "bfloat16" && dtype != "float16") {
    return dtype + ", neither bfloat16 nor float16";
  }
  if (query.num_experts.value_or(1) > kHopperMaxExperts) {
    return std::to_string(*query.num_experts) + " experts, more than " + std::to_string(kHopperMaxExperts);
  }
  const std::string hidden = not_a_multiple("a hidden size of", query.hidden_size);
  return !hidden.empty() ? hidden : not_a_multiple("an intermediate size of", query.intermediate_size);
}

/// What the layer's experts run on; the op itself has CPU kernels alone.
KernelPlan plan_grouped_mlp_on_cuda(const KernelQuery& query) {
  std::string obstacle;
  if (query.experts_backend == "hopper") {
    obstacle = obstacle_to_hopper(query);
    if (obstacle.empty()) {
      const bool knows_rows = query.num_experts && (query.num_rows || (query.num_tokens && query.top_k));
      if (!knows_rows) {
        return {query.op, "cuda", "grouped_mlp_hopper", "The rows of an expert decide on the tiles."};
      }
      const int64_t rows = hopper_tile_rows(total_rows(query), *query.num_experts);
      const char* const weight_rows = rows <= kHopperTallTileRows ? "256" : "128";
      return {query.op, "cuda", "grouped_mlp_hopper",
              "Tiles of up to " + std::to_string(rows) + " rows of an expert by " + weight_rows +
                  " of its weights: few rows are bound by reading weights, many by the products."};
    }
    obstacle = "The kernels for Hopper do not take " + obstacle + ": ";
  }
  const bool fits = query.dtype == "bfloat16" && query.hidden_size.value_or(8) % 8 == 0 &&
                    query.intermediate_size.value_or(8) % 8 == 0;
  return fits ? KernelPlan{query.op, "torch", "grouped_mm",
                           obstacle +
                               "One grouped matrix product takes all experts; on GPUs of another compute "
                               "capability than 9 and 10 torch takes them one by one."}
              : KernelPlan{query.op, "torch", "loop",
                           obstacle +
                               "Only bfloat16, with hidden and intermediate sizes that are multiples of 8, fits "
                               "torch's grouped_mm; the experts run one after another."};
}

KernelPlan plan_biased_topk_on_cuda(const KernelQuery& query) {
  const std::string most_experts = std::to_string(kMaxWarpExperts);
  const std::string most_top_k = std::to_string(kMaxWarpTopK);
  return fits_warp(query.num_experts.value_or(1), query.top_k.value_or(1))
             ? KernelPlan{query.op, "cuda", "biased_topk_warp",
                          "A warp routes a row of up to " + most_experts + " experts with a top_k of up to " +
                              most_top_k + "."}
             : KernelPlan{query.op, "cuda", "biased_topk_block",
                          "A block routes a row of more than " + most_experts + " experts or with a top_k above " +
                              most_top_k + "."};
}

KernelPlan plan_biased_topk_and_plan_on_cuda(const KernelQuery& query) {
  const std::string limits = std::to_string(kMaxPlannedTokens) + " tokens with " + std::to_string(kMaxPlannedSlots) +
                             " slots, " + std::to_string(kMaxWarpExperts) + " experts and a top_k of " +
                             std::to_string(kMaxWarpTopK) + ", on compute capability 9 and 10";
  if (is_one_launch(query.compute_capability.value_or(0), query.num_tokens.value_or(1), query.num_experts.value_or(1),
                    query.top_k.value_or(1))) {
    return {query.op, "cuda", query.op, "One launch routes and plans up to " + limits + "."};
  }
  return {query.op, "cuda", plan_biased_topk_on_cuda(query).kernel + ", counting_sort",
          "One launch routes and plans no more than " + limits + ": biased_topk and moe_plan run one after the other."};
}

KernelPlan plan_moe_plan_on_cuda(const KernelQuery& query) {
  std::string blocks;
  if (query.num_tokens && query.top_k) {
    const int64_t num_blocks = moe_plan_cuda_num_blocks(*query.num_tokens * *query.top_k);
    blocks = num_blocks == 1 ? " by one block" : " by " + std::to_string(num_blocks) + " blocks";
  }
  return {query.op, "cuda", "counting_sort", "The slots are counted and placed on the device" + blocks + "."};
}

KernelPlan plan_on_cuda(const KernelQuery& query) {
  if (query.op == "moe_plan") {
    return plan_moe_plan_on_cuda(query);
  }
  if (query.op == "grouped_mlp") {
    return plan_grouped_mlp_on_cuda(query);
  }
  if (query.op == "moe_permute") {
    return {query.op, "cuda", query.op,
            "A block copies a row; with slot_rows, a thread its part of a token to all rows."};
  }
  if (query.op == "biased_topk") {
    return plan_biased_topk_on_cuda(query);
  }
  if (query.op == "biased_topk_and_plan") {
    return plan_biased_topk_and_plan_on_cuda(query);
  }
  return {query.op, "cuda", query.op, "One kernel computes every size."};
}

}  // namespace

KernelPlan kernel_plan(const KernelQuery& query) {
  check_choice("op", query.op, kOps);
  check_choice("device", query.device, kDevices);
  const bool is_index_op = query.op == "moe_plan";
  if (query.dtype) {
    if (is_index_op) {
      check_choice("dtype (of moe_plan's ids)", *query.dtype, kIndexTypes);
    } else {
      check_choice("dtype", *query.dtype, kFloatingTypes);
    }
  }
  check_choice("experts_backend", query.experts_backend, kExpertsBackends);
  check_size("num_tokens", query.num_tokens, 0);
  check_size("num_rows", query.num_rows, 0);
  check_size("num_experts", query.num_experts, 1);
  check_size("top_k", query.top_k, 1);
  check_size("hidden_size", query.hidden_size, 1);
  check_size("intermediate_size", query.intermediate_size, 1);
  check_size("compute_capability", query.compute_capability, 1);
  const int64_t capability = query.compute_capability.value_or(1);
  ZEXPERT_CHECK(capability < 30, "compute_capability must be a major number, such as 9, got ", capability);
  const bool is_routing = query.op == "biased_topk" || query.op == "biased_topk_and_plan";
  if (is_routing) {
    check_routing(query);
  }
  if (query.device == "cuda") {
    const int64_t num_experts = query.num_experts.value_or(1);
    ZEXPERT_CHECK(num_experts <= kMaxExpertsOnCuda || !(is_routing || is_index_op), "num_experts must be at most ",
                  kMaxExpertsOnCuda, " on CUDA, got ", num_experts);
    return plan_on_cuda(query);
  }

  const char* isa = instruction_set(cpu_capability());
  if (query.op == "grouped_mlp") {
    return plan_grouped_mlp(query, isa);
  }
  if (is_index_op) {
    return {query.op, "cpu", "counting_sort", "The slots are counted and placed by integer code without vectors."};
  }
  if (query.op == "moe_permute") {
    return {query.op, "cpu", "row_copy", "Rows are copied whole, whatever their type."};
  }
  const std::string kernel =
      query.op == "biased_topk_and_plan" ? std::string("biased_topk_") + isa + ", counting_sort" : query.op + "_" + isa;
  return {query.op, "cpu", kernel,
          std::string("The kernel is compiled for several instruction sets, and ") + name(cpu_capability()) +
              " is the best of them that this machine has and ZEXPERT_CPU_CAPABILITY allows."};
}

}  // namespace zexpert
