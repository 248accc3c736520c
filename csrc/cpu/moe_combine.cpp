// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_combine.h"

#include <algorithm>

#include "cpu/check_params.h"
#include "zexpert/moe_finalize.h"

namespace zexpert {

void moe_combine_cpu(const MoeCombineParams& params) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  const int64_t num_slots = params.num_ranks * params.max_tokens * params.top_k;
  const int64_t bad = find_out_of_range(params.slot_rows, num_slots, -1, params.num_rows);
  ZEXPERT_CHECK(bad < 0, "slot_rows must be in [-1, ", params.num_rows, "), got ", params.slot_rows[bad]);

  const auto has_row = [&](int64_t row) {
    const int32_t* slots = params.slot_rows + row * params.top_k;
    return std::any_of(slots, slots + params.top_k, [](int32_t slot_row) { return slot_row >= 0; });
  };
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    const auto* weights = static_cast<const accumulate_t<T>*>(params.topk_weights);
    MoeFinalizeParams sums;
    sums.rows = params.rows;
    sums.data_type = params.data_type;
    sums.num_rows = params.num_rows;
    sums.top_k = params.top_k;
    sums.hidden_size = params.hidden_size;
    sums.rows_row_stride = params.rows_row_stride;
    sums.out_row_stride = params.hidden_size;
    // Runs of rows that have slots: those of one rank that it dispatched are one run.
    for (int64_t peer = 0; peer < params.num_ranks; ++peer) {
      const int64_t last = (peer + 1) * params.max_tokens;
      for (int64_t begin = peer * params.max_tokens; begin < last;) {
        int64_t end = begin;
        while (end < last && has_row(end)) ++end;
        const int64_t target = params.rank * params.max_tokens + begin - peer * params.max_tokens;
        sums.slot_rows = params.slot_rows + begin * params.top_k;
        sums.topk_weights = weights == nullptr ? nullptr : weights + begin * params.top_k;
        sums.out = static_cast<T*>(params.out.of_rank[peer]) + target * params.hidden_size;
        sums.num_tokens = end - begin;
        moe_finalize_cpu(sums);
        begin = std::max(end, begin + 1);
      }
    }
  });
}

}  // namespace zexpert
