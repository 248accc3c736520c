// SPDX-License-Identifier: Apache-2.0
#include "zexpert/kernel_plan.h"

#include <algorithm>
#include <array>
#include <limits>
#include <sstream>
#include <string_view>

#include "zexpert/biased_topk.h"
#include "zexpert/cpu_capability.h"
#include "zexpert/error.h"
#include "zexpert/grouped_mlp.h"
#include "zexpert/grouped_mlp_choice.h"
#include "zexpert/moe_plan.h"

namespace zexpert {
namespace {

constexpr std::array<std::string_view, 17> kOps = {"biased_topk",
                                                   "biased_topk_and_plan",
                                                   "biased_topk_choices",
                                                   "router_logits",
                                                   "route",
                                                   "zero_expert_accumulate",
                                                   "moe_plan",
                                                   "moe_permute",
                                                   "silu_and_mul",
                                                   "grouped_mlp",
                                                   "fused_moe",
                                                   "moe_finalize",
                                                   "quantize_blockwise",
                                                   "dequantize_blockwise",
                                                   "moe_dispatch",
                                                   "moe_combine",
                                                   "rank_barrier"};
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

/// The width of the logits; num_experts is its older name.
std::optional<int64_t> width(const KernelQuery& query) {
  return query.num_logits ? query.num_logits : query.num_experts;
}

/// The limits of the routing operators, with their messages.
void check_routing(const KernelQuery& query) {
  const int64_t top_k = query.top_k.value_or(1);
  const int64_t num_logits = width(query).value_or(top_k);
  ZEXPERT_CHECK(top_k <= kMaxTopK, "top_k must be between 1 and ", kMaxTopK, ", got ", top_k);
  ZEXPERT_CHECK(top_k <= num_logits, "top_k must be at most the number of experts (", num_logits, "), got ", top_k);
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

std::optional<int64_t> known_rows(const KernelQuery& query) {
  if (query.num_rows || !query.num_tokens || !query.top_k) {
    return query.num_rows;
  }
  return *query.num_tokens * *query.top_k;
}

/// The rows of all experts together, from whichever sizes give them.
int64_t total_rows(const KernelQuery& query) {
  const std::optional<int64_t> rows = known_rows(query);
  ZEXPERT_CHECK(rows.has_value(), query.op,
                " chooses its kernel by rows per expert: num_rows, or num_tokens and top_k, must be given");
  return *rows;
}

/// The call that a query asks about. A size that is not known is one that fits.
GroupedMlpCall grouped_mlp_call(const KernelQuery& query) {
  GroupedMlpCall call;
  call.device.is_cuda = query.device == "cuda";
  call.device.compute_capability = 10 * query.compute_capability.value_or(0);
  call.device.has_hopper_code = query.has_hopper_code;
  const bool keeps_gate_up = query.op == "fused_moe" && query.keep_gate_up;
  call.task = keeps_gate_up ? GroupedMlpTask::kForwardKeepingGateUp : GroupedMlpTask::kForward;
  call.data_type = floating_type(query.dtype.value_or("float32"));
  call.has_fp8_weights = query.weight_dtype == "float8_e4m3fn";
  call.num_experts = query.num_experts.value_or(1);
  call.hidden_size = query.hidden_size.value_or(kHopperSizeStep);
  call.intermediate_size = query.intermediate_size.value_or(kHopperSizeStep);
  return call;
}

/// Why zexpert's own kernels cannot serve a call on a Hopper GPU, and a colon; else nothing.
std::string obstacle_to_hopper(const GroupedMlpCall& call) {
  std::ostringstream text;
  if (call.device.compute_capability == 90) {
    can_serve(GroupedMlpImplementation::kHopper, call, [&](const auto&... parts) { (text << ... << parts) << ": "; });
  }
  return text.str();
}

/// Implementation "cpu", which chooses by an expert's rows.
KernelPlan plan_cpu_experts(const KernelQuery& query, const GroupedMlpCall& call, const char* isa) {
  if (call.task == GroupedMlpTask::kForwardKeepingGateUp) {
    return {query.op, "torch", call.has_fp8_weights ? "dequantize_blockwise, matmul" : "matmul",
            "Training runs every expert through a matrix-product library."};
  }
  ZEXPERT_CHECK(query.num_experts.has_value(), query.op,
                " chooses its kernel by rows per expert: num_experts must be given");
  const int64_t rows = total_rows(query);
  const int64_t mean = (rows + *query.num_experts - 1) / *query.num_experts;
  const std::string about = std::to_string(rows) + " rows for " + std::to_string(*query.num_experts) +
                            " experts are at most " + std::to_string(mean) + " each if spread evenly, ";
  const int64_t few_rows = few_rows_limit(call.data_type, cpu_capability(), call.has_fp8_weights);
  const std::string limit = std::to_string(few_rows);
  if (mean <= few_rows) {
    return {query.op, "cpu", std::string("grouped_mlp_") + isa + (call.has_fp8_weights ? "_fp8" : ""),
            about + "and a segment of up to " + limit +
                " rows is bound by reading its weights, which this kernel streams."};
  }
  return {query.op, "torch", call.has_fp8_weights ? "dequantize_blockwise, matmul" : "matmul",
          about + "and a segment of more than " + limit + " rows repays a matrix-product library's packing."};
}

KernelPlan plan_hopper_experts(const KernelQuery& query, const GroupedMlpCall& call) {
  const std::string kernel = call.has_fp8_weights ? "grouped_product_fp8" : "grouped_product";
  const std::optional<int64_t> num_rows = known_rows(query);
  if (!num_rows || !query.num_experts) {
    return {query.op, "cuda", kernel, "The rows of an expert decide on the tiles."};
  }
  const int64_t rows = hopper_tile_rows(*num_rows, *query.num_experts, call.has_fp8_weights);
  const char* const weight_rows = rows <= kHopperTallTileRows ? "256" : "128";
  return {query.op, "cuda", kernel,
          "Tiles of up to " + std::to_string(rows) + " rows of an expert by " + weight_rows +
              " of its weights: few rows are bound by reading weights, many by the products."};
}

/// What choose_grouped_mlp answers, as the operators ask it.
KernelPlan plan_experts(const KernelQuery& query, const char* isa) {
  const GroupedMlpCall call = grouped_mlp_call(query);
  const GroupedMlpImplementation implementation = choose_grouped_mlp(query.implementation, call);
  const std::string obstacle = query.implementation == "auto" ? obstacle_to_hopper(call) : "";
  KernelPlan plan;
  switch (implementation) {
    case GroupedMlpImplementation::kCpu: plan = plan_cpu_experts(query, call, isa); break;
    case GroupedMlpImplementation::kHopper: plan = plan_hopper_experts(query, call); break;
    case GroupedMlpImplementation::kGroupedMm:
      plan = {query.op, "torch", "grouped_mm",
              obstacle +
                  "One grouped matrix product computes all experts; on GPUs of another compute capability than "
                  "9 and 10 PyTorch computes them one by one."};
      break;
    case GroupedMlpImplementation::kTorch:
      plan = call.has_fp8_weights
                 ? KernelPlan{query.op, "torch", "dequantize_blockwise, loop",
                              obstacle + "The experts are dequantised and run one after another."}
                 : KernelPlan{
                       query.op, "torch", "loop",
                       obstacle +
                           "The experts run one after another; bfloat16, with hidden and intermediate sizes that are "
                           "multiples of 8, would fit PyTorch's grouped_mm on a GPU."};
      break;
  }
  plan.implementation = name(implementation);
  return plan;
}

KernelPlan plan_biased_topk_on_cuda(const KernelQuery& query) {
  const std::string most_experts = std::to_string(kMaxWarpExperts);
  const std::string most_top_k = std::to_string(kMaxWarpTopK);
  return fits_warp(width(query).value_or(1), query.top_k.value_or(1))
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
  if (is_one_launch(query.compute_capability.value_or(0), query.num_tokens.value_or(1), width(query).value_or(1),
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

KernelPlan plan_router_logits_on_cuda(const KernelQuery& query) {
  const bool is_16_bit = query.dtype == "bfloat16" || query.dtype == "float16";
  if (query.compute_capability == 9 && is_16_bit && query.hidden_size.value_or(8) % 8 == 0) {
    return {query.op, "cuda", "router_logits_wgmma",
            "Compute capability 9.0 multiplies 16-bit hidden states by parts of the weights on its matrix units."};
  }
  return {
      query.op, "cuda", "router_logits",
      "The matrix units of compute capability 9.0 need compute_capability=9, 16-bit hidden states and a hidden size "
      "that is a multiple of 8; all else is float32 arithmetic."};
}

/// route is made of two operators.
KernelPlan plan_route(const KernelQuery& query) {
  KernelQuery part = query;
  part.op = "router_logits";
  const std::string logits = kernel_plan(part).kernel;
  part.op = "biased_topk_and_plan";
  part.dtype = query.dtype == "float64" ? "float64" : "float32";  // of the logits
  return {query.op, query.device, logits + ", " + kernel_plan(part).kernel,
          "router_logits and biased_topk_and_plan run one after the other."};
}

KernelPlan plan_on_cuda(const KernelQuery& query) {
  if (query.op == "router_logits") {
    return plan_router_logits_on_cuda(query);
  }
  if (query.op == "moe_plan") {
    return plan_moe_plan_on_cuda(query);
  }
  if (query.op == "moe_permute") {
    return {query.op, "cuda", query.op,
            "A block copies a row; with slot_rows, a thread its part of a token to all rows."};
  }
  if (query.op == "moe_dispatch") {
    return {query.op, "cuda", "place_tokens, send_rows",
            "A block places the tokens for a rank, then a block writes a row at a time."};
  }
  if (query.op == "rank_barrier") {
    return {query.op, "cuda", query.op, "A thread signals to a rank and waits for it."};
  }
  if (query.op == "biased_topk" || query.op == "biased_topk_choices") {
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
  if (query.weight_dtype) {
    const bool has_weights = query.op == "grouped_mlp" || query.op == "fused_moe";
    ZEXPERT_CHECK(has_weights, "weight_dtype must be None for ", query.op, ", got \"", *query.weight_dtype, "\"");
    ZEXPERT_CHECK(*query.weight_dtype == "float8_e4m3fn" || *query.weight_dtype == query.dtype.value_or("float32"),
                  "weight_dtype must be \"float8_e4m3fn\" or dtype (\"", query.dtype.value_or("float32"), "\"), got \"",
                  *query.weight_dtype, "\"");
  }
  check_size("num_tokens", query.num_tokens, 0);
  check_size("num_rows", query.num_rows, 0);
  check_size("num_experts", query.num_experts, 1);
  check_size("num_logits", query.num_logits, 1);
  check_size("top_k", query.top_k, 1);
  check_size("hidden_size", query.hidden_size, 1);
  check_size("intermediate_size", query.intermediate_size, 1);
  check_size("compute_capability", query.compute_capability, 1);
  const int64_t capability = query.compute_capability.value_or(1);
  ZEXPERT_CHECK(capability < 30, "compute_capability must be a major number, such as 9, got ", capability);
  const char* isa = instruction_set(cpu_capability());
  if (query.op == "grouped_mlp" || query.op == "fused_moe") {
    return plan_experts(query, isa);
  }
  if (query.op == "route") {
    return plan_route(query);
  }
  const bool is_routing =
      query.op == "biased_topk" || query.op == "biased_topk_and_plan" || query.op == "biased_topk_choices";
  if (is_routing) {
    check_routing(query);
  }
  if (query.device == "cuda") {
    const int64_t num_experts = (is_routing ? width(query) : query.num_experts).value_or(1);
    ZEXPERT_CHECK(num_experts <= kMaxExpertsOnCuda || !(is_routing || is_index_op),
                  is_routing ? "num_logits" : "num_experts", " must be at most ", kMaxExpertsOnCuda, " on CUDA, got ",
                  num_experts);
    return plan_on_cuda(query);
  }

  if (is_index_op) {
    return {query.op, "cpu", "counting_sort", "The slots are counted and placed by integer code without vectors."};
  }
  if (query.op == "moe_permute" || query.op == "moe_dispatch") {
    return {query.op, "cpu", "row_copy", "Rows are copied whole, whatever their type."};
  }
  if (query.op == "rank_barrier") {
    return {query.op, "cpu", query.op, "Signals are words of memory that the processes share."};
  }
  if (query.op == "moe_combine") {
    return {query.op, "cpu", std::string("moe_finalize_") + isa, "A row is a sum as moe_finalize forms it."};
  }
  const std::string kernel =
      query.op == "biased_topk_and_plan" ? std::string("biased_topk_") + isa + ", counting_sort" : query.op + "_" + isa;
  return {query.op, "cpu", kernel,
          std::string("The kernel is compiled for several instruction sets, and ") + name(cpu_capability()) +
              " is the best of them that this machine has and ZEXPERT_CPU_CAPABILITY allows."};
}

}  // namespace zexpert
