// SPDX-License-Identifier: Apache-2.0
// kernel_plan: which kernel an operator call runs, and why, without running it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace zexpert {

/// An operator call, as far as the choice of its kernel depends on it. Sizes are per call and may stay unknown except
/// where kernel_plan says otherwise.
struct KernelQuery {
  std::string op;                             ///< the operator's name, "biased_topk" for one
  std::string device = "cpu";                 ///< "cpu" or "cuda"
  std::optional<std::string> dtype;           ///< of the data; float32 unless given, int32 (the ids') for moe_plan
  std::optional<std::string> weight_dtype;    ///< of grouped_mlp's and fused_moe's weights: dtype or float8_e4m3fn
  std::optional<int64_t> num_tokens;          ///< T
  std::optional<int64_t> num_rows;            ///< rows of all experts together; num_tokens * top_k unless given
  std::optional<int64_t> num_experts;         ///< experts that have a feed-forward network
  std::optional<int64_t> num_logits;          ///< N, the logits' width; num_experts unless given
  std::optional<int64_t> top_k;               ///< K
  std::optional<int64_t> hidden_size;         ///< H
  std::optional<int64_t> intermediate_size;   ///< F
  std::optional<int64_t> compute_capability;  ///< the GPU's, its major number
  bool has_hopper_code = true;                ///< grouped_mlp and fused_moe on CUDA: zexpert was compiled for 9.0a
  bool keep_gate_up = true;                   ///< fused_moe's argument
  std::string implementation = "auto";        ///< grouped_mlp's and fused_moe's argument
};

struct KernelPlan {
  std::string op;
  std::string backend;              ///< "cpu", "cuda": a kernel of zexpert's own; "torch": PyTorch's matrix product
  std::string kernel;               ///< short name
  std::string reason;               ///< one sentence
  std::string implementation = "";  ///< of grouped_mlp and fused_moe: the name that forces it
};

/// The kernel that runs for `query` on this machine. On the CPU grouped_mlp, and fused_moe without keep_gate_up, choose
/// by an expert's rows: they need num_experts, and num_rows or num_tokens with top_k, and the plan is for an expert
/// with the mean number of rows. Throws Error for an unknown operator, device or dtype, for a size out of range, for
/// one that is missing, and for an implementation that cannot serve.
KernelPlan kernel_plan(const KernelQuery& query);

}  // namespace zexpert
