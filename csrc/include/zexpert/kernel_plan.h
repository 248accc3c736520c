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
  std::optional<int64_t> num_tokens;          ///< T
  std::optional<int64_t> num_rows;            ///< rows of all experts together; num_tokens * top_k unless given
  std::optional<int64_t> num_experts;         ///< experts that have a feed-forward network; of biased_topk, all
  std::optional<int64_t> top_k;               ///< K
  std::optional<int64_t> hidden_size;         ///< H
  std::optional<int64_t> intermediate_size;   ///< F
  std::optional<int64_t> compute_capability;  ///< the GPU's, its major number: biased_topk_and_plan on CUDA
  std::string experts_backend = "auto";       ///< grouped_mlp on CUDA: "auto", or "hopper" to prefer its kernels
};

struct KernelPlan {
  std::string op;
  std::string backend;  ///< "cpu", "cuda": a kernel of zexpert's own; "torch": PyTorch's matrix product
  std::string kernel;   ///< short name
  std::string reason;   ///< one sentence
};

/// The kernel that runs for `query` on this machine. grouped_mlp chooses by an expert's rows: it needs num_experts, and
/// num_rows or num_tokens with top_k, and the plan is for an expert with the mean number of rows.
/// Throws Error for an unknown operator, device or dtype, for a size out of range and for one that is missing.
KernelPlan kernel_plan(const KernelQuery& query);

}  // namespace zexpert
