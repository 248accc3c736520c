// SPDX-License-Identifier: Apache-2.0
// Checks of an operator's parameters, before anything is read or written.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <utility>

#include "cpu/expert_offsets.h"
#include "cpu/index_range.h"
#include "zexpert/error.h"

namespace zexpert {

inline void check_sizes(std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  for (const auto& [name, size] : sizes) ZEXPERT_CHECK(size >= 0, name, " must not be negative, got ", size);
}

/// Of arrays that have elements.
inline void check_pointers(std::initializer_list<std::pair<const char*, const void*>> pointers) {
  for (const auto& [name, pointer] : pointers) ZEXPERT_CHECK(pointer != nullptr, name, " must not be null");
}

/// The sizes and row_slots that moe_permute, its backward and grouped_mlp take, of which the first num_rows count.
template <typename Params>
void check_row_slots(const Params& params, int64_t num_rows) {
  check_sizes({{"num_rows", params.num_rows},
               {"num_tokens", params.num_tokens},
               {"top_k", params.top_k},
               {"hidden_size", params.hidden_size}});
  if (num_rows > 0) {
    check_pointers({{"row_slots", params.row_slots}});
  }
  const int64_t num_slots = params.num_tokens * params.top_k;
  const int64_t bad = find_out_of_range(params.row_slots, num_rows, 0, num_slots);
  ZEXPERT_CHECK(bad < 0, "row_slots must lie in [0, ", num_slots, ") below the last offset, got ",
                params.row_slots[bad]);
}

/// The offsets of grouped_mlp, and its row_slots if it has them.
template <typename Params>
void check_expert_rows(const Params& params) {
  check_expert_offsets(params.expert_offsets, params.num_experts, params.num_rows);
  if (params.row_slots != nullptr) {
    check_row_slots(params, params.expert_offsets[params.num_experts]);
  }
}

}  // namespace zexpert
