// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_permute_backward.h"

#include <cstddef>
#include <vector>

#include "cpu/check_params.h"
#include "zexpert/parallel.h"

namespace zexpert {
namespace {

/// Rows in the order of their slots: slot s has rows[offsets[s]] .. rows[offsets[s + 1] - 1].
struct SlotRows {
  std::vector<int32_t> offsets;
  std::vector<int32_t> rows;
};

/// A counting sort: a plan names each slot once, but any row_slots that moe_permute takes has a gradient.
SlotRows sort_rows_by_slot(const MoePermuteBackwardParams& params) {
  SlotRows sorted;
  sorted.offsets.resize(static_cast<size_t>(params.num_tokens * params.top_k) + 2);
  sorted.rows.resize(static_cast<size_t>(params.num_rows));
  // Counts lie two places late, so that while rows are placed each slot's offset moves up to where the next one starts.
  for (int64_t row = 0; row < params.num_rows; ++row) ++sorted.offsets[static_cast<size_t>(params.row_slots[row]) + 2];
  for (size_t slot = 2; slot < sorted.offsets.size(); ++slot) sorted.offsets[slot] += sorted.offsets[slot - 1];
  for (int64_t row = 0; row < params.num_rows; ++row) {
    int32_t& place = sorted.offsets[static_cast<size_t>(params.row_slots[row]) + 1];
    sorted.rows[static_cast<size_t>(place++)] = static_cast<int32_t>(row);
  }
  return sorted;
}

}  // namespace
}  // namespace zexpert

#define ZEXPERT_KERNEL_FILE "cpu/moe_permute_backward_kernel.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void moe_permute_backward_cpu(const MoePermuteBackwardParams& params) {
  check_row_slots(params, params.num_rows);
  if (params.num_tokens == 0 || params.hidden_size == 0) {
    return;
  }
  check_pointers({{"grad_hidden_states", params.grad_hidden_states}});
  if (params.num_rows > 0) {
    check_pointers({{"grad_rows", params.grad_rows}});
  }
  const SlotRows slot_rows = sort_rows_by_slot(params);
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    ZEXPERT_DISPATCH(moe_permute_backward<T>, params, slot_rows)
  });
}

}  // namespace zexpert
