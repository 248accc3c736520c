// SPDX-License-Identifier: Apache-2.0
// moe_combine: weighted sums of expert rows written into the memory of the ranks that own the tokens.
#pragma once

#include <cstdint>
#include <limits>

#include "zexpert/check_params.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/error.h"
#include "zexpert/rank_arrays.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// For every rank p and i < max_tokens whose slots have a row, with t = p * max_tokens + i:
///   out[p][rank * max_tokens + i] = sum_k topk_weights[t, k] * rows[slot_rows[t, k]]
/// Slots with row -1 are skipped. Accumulated in float32 (float64 for float64 data) in slot order and rounded once.
/// Rows of out without slots are not written.
/// Strides count elements. All pointers are to memory that the computing device addresses.
struct MoeCombineParams {
  const void* rows = nullptr;          ///< [num_rows, hidden_size]; unit inner stride
  const int32_t* slot_rows = nullptr;  ///< [num_ranks * max_tokens, top_k]; contiguous; in [-1, num_rows)
  const void* topk_weights = nullptr;  ///< [num_ranks * max_tokens, top_k]; weight type; contiguous; null: all are 1
  RankArrays out;                      ///< [num_ranks * max_tokens, hidden_size]; type of rows; contiguous
  /// Type of rows and out. The weight type is float32, float64 for float64.
  ScalarType data_type = ScalarType::kFloat32;
  int64_t rank = 0;  ///< this process's
  int64_t num_ranks = 1;
  int64_t max_tokens = 0;
  int64_t top_k = 0;
  int64_t num_rows = 0;
  int64_t hidden_size = 0;
  int64_t rows_row_stride = 0;
  int64_t most_multiprocessors = 0;  ///< of a GPU that the kernel may occupy; 0: all

  bool is_empty() const { return max_tokens == 0 || top_k == 0 || hidden_size == 0; }

  /// Throws Error for a size out of range, a missing array or a type that is not floating.
  void validate() const {
    detail::check_ranks(rank, num_ranks);
    detail::check_sizes({{"max_tokens", max_tokens},
                         {"top_k", top_k},
                         {"num_rows", num_rows},
                         {"hidden_size", hidden_size},
                         {"most_multiprocessors", most_multiprocessors}});
    ZEXPERT_CHECK(max_tokens <= std::numeric_limits<int32_t>::max() / num_ranks,
                  "num_ranks * max_tokens must be below 2^31, got ", num_ranks, " * ", max_tokens);
    detail::check_floating(data_type);
    if (is_empty()) {
      return;
    }
    detail::check_pointers({{"slot_rows", slot_rows}});
    detail::check_arrays("out", out, num_ranks);
    if (num_rows > 0) {
      detail::check_pointers({{"rows", rows}});
    }
  }
};

/// Throws Error, before anything is written, for params that are not valid; on the CPU also if an entry of slot_rows is
/// outside [-1, num_rows). CUDA skips a slot with such an entry.
void moe_combine_cpu(const MoeCombineParams& params);
void moe_combine_cuda(const MoeCombineParams& params, cudaStream_t stream);

}  // namespace zexpert
