// SPDX-License-Identifier: Apache-2.0
// moe_dispatch: token rows written into the memory of the ranks that own their experts.
#pragma once

#include <cstdint>
#include <limits>

#include "zexpert/check_params.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/error.h"
#include "zexpert/rank_arrays.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// A token is sent once to every rank that owns one of its experts; rank p owns those from p * num_local_experts on.
/// The i-th token that this rank sends to rank p, in ascending order, goes to row `rank` * max_tokens + i of rank p:
///   rows[p][row]       = hidden_states[token]
///   ids[p][row, k]     = topk_ids[token, k] - p * num_local_experts, -1 if that is no expert of rank p
///   weights[p][row, k] = topk_weights[token, k]
/// In the rows of this rank's share that hold no token, ids are -1 and nothing else is written.
/// Strides count elements. All pointers are to memory that the computing device addresses.
struct MoeDispatchParams {
  const void* hidden_states = nullptr;  ///< [num_tokens, hidden_size]; unit inner stride
  const void* topk_ids = nullptr;       ///< [num_tokens, top_k]; contiguous
  const void* topk_weights = nullptr;   ///< [num_tokens, top_k]; weight type; contiguous
  RankArrays rows;                      ///< [num_ranks * max_tokens, hidden_size]; type of hidden_states; contiguous
  RankArrays ids;                       ///< [num_ranks * max_tokens, top_k] int32; contiguous
  RankArrays weights;                   ///< [num_ranks * max_tokens, top_k]; weight type; contiguous
  int32_t* slot_rows = nullptr;   ///< [num_tokens, num_ranks]: p * max_tokens + i, or -1 if the token is not sent to p
  int32_t* row_tokens = nullptr;  ///< [num_ranks * max_tokens]: the inverse, -1 for a row without a token
  /// Type of hidden_states and rows. The weight type is float32, float64 for float64.
  ScalarType data_type = ScalarType::kFloat32;
  ScalarType ids_type = ScalarType::kInt32;  ///< of topk_ids
  int64_t rank = 0;                          ///< this process's
  int64_t num_ranks = 1;
  int64_t max_tokens = 0;  ///< most tokens of any rank, the same on all ranks
  int64_t num_local_experts = 0;
  int64_t num_tokens = 0;
  int64_t top_k = 0;
  int64_t hidden_size = 0;
  int64_t hidden_row_stride = 0;
  int64_t most_multiprocessors = 0;  ///< of a GPU that the kernel may occupy; 0: all

  bool is_empty() const { return max_tokens == 0; }

  /// Throws Error for a size out of range, a missing array or a wrong type.
  void validate() const {
    detail::check_ranks(rank, num_ranks);
    detail::check_sizes({{"max_tokens", max_tokens},
                         {"num_local_experts", num_local_experts},
                         {"num_tokens", num_tokens},
                         {"top_k", top_k},
                         {"hidden_size", hidden_size},
                         {"most_multiprocessors", most_multiprocessors}});
    ZEXPERT_CHECK(num_tokens <= max_tokens, "num_tokens must be at most max_tokens (", max_tokens, "), got ",
                  num_tokens);
    ZEXPERT_CHECK(max_tokens <= std::numeric_limits<int32_t>::max() / num_ranks,
                  "num_ranks * max_tokens must be below 2^31, got ", num_ranks, " * ", max_tokens);
    detail::check_floating(data_type);
    detail::check_index_type("topk_ids", ids_type);
    if (is_empty()) {
      return;
    }
    detail::check_pointers({{"row_tokens", row_tokens}});
    if (num_tokens > 0) {
      detail::check_pointers({{"slot_rows", slot_rows}});
    }
    if (top_k > 0) {
      detail::check_arrays("ids", ids, num_ranks);
      detail::check_arrays("weights", weights, num_ranks);
    }
    if (num_tokens * top_k > 0) {
      detail::check_pointers({{"topk_ids", topk_ids}, {"topk_weights", topk_weights}});
      if (hidden_size > 0) {
        detail::check_pointers({{"hidden_states", hidden_states}});
        detail::check_arrays("rows", rows, num_ranks);
      }
    }
  }
};

/// Throws Error, before anything is written, for params that are not valid; on the CPU also if an id is outside
/// [-1, num_ranks * num_local_experts). CUDA sends no row for such an id.
void moe_dispatch_cpu(const MoeDispatchParams& params);
void moe_dispatch_cuda(const MoeDispatchParams& params, cudaStream_t stream);

}  // namespace zexpert
