// SPDX-License-Identifier: Apache-2.0
// Checks and sizes of expert_offsets in host memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "zexpert/error.h"

namespace zexpert {

/// Throws Error unless the num_experts + 1 offsets are an ascending sequence from 0 to at most num_rows.
inline void check_expert_offsets(const int32_t* expert_offsets, int64_t num_experts, int64_t num_rows) {
  ZEXPERT_CHECK(expert_offsets[0] == 0, "expert_offsets must start at 0, got ", expert_offsets[0]);
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    ZEXPERT_CHECK(expert_offsets[expert] <= expert_offsets[expert + 1], "expert_offsets must ascend, got ",
                  expert_offsets[expert + 1], " after ", expert_offsets[expert]);
  }
  ZEXPERT_CHECK(expert_offsets[num_experts] <= num_rows, "expert_offsets must be at most the number of rows (",
                num_rows, "), got ", expert_offsets[num_experts]);
}

/// The number of rows of the expert with most rows.
inline int64_t longest_segment(const int32_t* expert_offsets, int64_t num_experts) {
  int64_t longest = 0;
  for (int64_t expert = 0; expert < num_experts; ++expert) {
    longest = std::max<int64_t>(longest, expert_offsets[expert + 1] - expert_offsets[expert]);
  }
  return longest;
}

}  // namespace zexpert
