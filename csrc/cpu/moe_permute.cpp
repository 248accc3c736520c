// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_permute.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <vector>

#include "cpu/check_params.h"
#include "zexpert/moe_finalize.h"
#include "zexpert/parallel.h"

namespace zexpert {
namespace {

/// The rows of every slot, in ascending order, as lists: first_rows[slot], then next_rows[row] until that is -1.
struct RowLists {
  int32_t* first_rows;
  int32_t* next_rows;
  bool any_slot_repeated;  ///< whether a list has more than one row
};

RowLists list_rows_by_slot(const MoePermuteBackwardParams& params, int64_t num_rows) {
  const int64_t num_slots = params.num_tokens * params.top_k;
  auto* first_rows = static_cast<int32_t*>(params.workspace);
  RowLists lists{first_rows, first_rows + num_slots, false};
  std::fill_n(first_rows, num_slots, -1);
  for (int64_t row = num_rows - 1; row >= 0; --row) {
    int32_t& first = first_rows[params.row_slots[row]];
    lists.any_slot_repeated |= first >= 0;
    lists.next_rows[row] = first;
    first = static_cast<int32_t>(row);
  }
  return lists;
}

/// Sums tokens again that have several rows for one slot. No plan has such slots.
void sum_repeated_slots(const MoePermuteBackwardParams& params, const MoeFinalizeParams& sums, const RowLists& lists) {
  int64_t element = 0;
  visit_floating(params.data_type, [&](auto value) { element = sizeof(value); });
  std::vector<int32_t> rows;
  for (int64_t token = 0; token < params.num_tokens; ++token) {
    rows.clear();
    for (int64_t slot = token * params.top_k; slot < (token + 1) * params.top_k; ++slot) {
      for (int32_t row = lists.first_rows[slot]; row >= 0; row = lists.next_rows[row]) rows.push_back(row);
    }
    if (static_cast<int64_t>(rows.size()) > 1) {
      MoeFinalizeParams sum = sums;
      sum.slot_rows = rows.data();
      sum.out = static_cast<char*>(sums.out) + token * sums.out_row_stride * element;
      sum.num_tokens = 1;
      sum.top_k = static_cast<int64_t>(rows.size());
      moe_finalize_cpu(sum);
    }
  }
}

}  // namespace

void moe_permute_cpu(const MoePermuteParams& params) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  const int64_t num_rows = num_working_rows(params.last_offset, params.num_rows);
  check_row_slots(params.row_slots, num_rows, params.num_tokens * params.top_k);

  // Below this many bytes a range costs less than waking a thread.
  constexpr int64_t kGrainBytes = 128 * 1024;
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    const int64_t row_bytes = params.hidden_size * static_cast<int64_t>(sizeof(T));
    parallel_for(0, num_rows, std::max<int64_t>(kGrainBytes / row_bytes, 1), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t token = params.row_slots[row] / params.top_k;
        std::memcpy(static_cast<T*>(params.rows) + row * params.hidden_size,
                    static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride,
                    static_cast<size_t>(row_bytes));
      }
    });
  });
}

void moe_permute_backward_cpu(const MoePermuteBackwardParams& params) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  const int64_t num_rows = num_working_rows(params.last_offset, params.num_rows);
  check_row_slots(params.row_slots, num_rows, params.num_tokens * params.top_k);

  MoeFinalizeParams sums = params.as_moe_finalize();
  sums.num_rows = num_rows;
  if (params.slot_rows != nullptr) {
    moe_finalize_cpu(sums);
    return;
  }
  const RowLists lists = list_rows_by_slot(params, num_rows);
  sums.slot_rows = lists.first_rows;
  moe_finalize_cpu(sums);
  if (lists.any_slot_repeated) {
    sum_repeated_slots(params, sums, lists);
  }
}

}  // namespace zexpert
