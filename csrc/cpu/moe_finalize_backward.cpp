// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_finalize_backward.h"

#include <cstddef>
#include <cstring>
#include <vector>

#include "cpu/check_params.h"
#include "cpu/index_range.h"
#include "zexpert/error.h"
#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/moe_finalize_backward_kernel.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {
namespace {

/// The rows that no slot names. Throws Error if two slots name one: they would write its gradient at the same time.
std::vector<int64_t> find_idle_rows(const MoeFinalizeBackwardParams& params) {
  std::vector<bool> named(static_cast<size_t>(params.num_rows));
  for (int64_t slot = 0; slot < params.num_tokens * params.top_k; ++slot) {
    const int32_t row = params.slot_rows[slot];
    if (row >= 0) {
      ZEXPERT_CHECK(!named[static_cast<size_t>(row)], "slot_rows must name every row at most once, got ", row,
                    " twice");
      named[static_cast<size_t>(row)] = true;
    }
  }
  std::vector<int64_t> idle_rows;
  for (int64_t row = 0; row < params.num_rows; ++row) {
    if (!named[static_cast<size_t>(row)]) {
      idle_rows.push_back(row);
    }
  }
  return idle_rows;
}

template <typename T>
void clear_rows(const MoeFinalizeBackwardParams& params, const std::vector<int64_t>& rows) {
  // Below this many bytes a range costs less than waking a thread.
  constexpr int64_t kGrainBytes = 128 * 1024;
  const int64_t row_bytes = params.hidden_size * static_cast<int64_t>(sizeof(T));
  auto* grad_rows = static_cast<char*>(params.grad_rows);
  const int64_t grain_size = std::max<int64_t>(kGrainBytes / std::max<int64_t>(row_bytes, 1), 1);
  parallel_for(0, static_cast<int64_t>(rows.size()), grain_size, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      std::memset(grad_rows + rows[static_cast<size_t>(i)] * row_bytes, 0, static_cast<size_t>(row_bytes));
    }
  });
}

}  // namespace

void moe_finalize_backward_cpu(const MoeFinalizeBackwardParams& params) {
  check_sizes({{"num_rows", params.num_rows},
               {"num_tokens", params.num_tokens},
               {"top_k", params.top_k},
               {"hidden_size", params.hidden_size}});
  if (params.num_tokens * params.top_k > 0) {
    check_pointers({{"slot_rows", params.slot_rows},
                    {"topk_weights", params.topk_weights},
                    {"grad_topk_weights", params.grad_topk_weights}});
  }
  if (params.num_tokens > 0) {
    check_pointers({{"zero_weight", params.zero_weight}, {"grad_zero_weight", params.grad_zero_weight}});
    if (params.hidden_size > 0) {
      check_pointers({{"grad_out", params.grad_out},
                      {"hidden_states", params.hidden_states},
                      {"grad_hidden_states", params.grad_hidden_states}});
    }
  }
  if (params.num_rows * params.hidden_size > 0) {
    check_pointers({{"rows", params.rows}, {"grad_rows", params.grad_rows}});
  }
  const int64_t bad = find_out_of_range(params.slot_rows, params.num_tokens * params.top_k, -1, params.num_rows);
  ZEXPERT_CHECK(bad < 0, "slot_rows must lie in [-1, ", params.num_rows, "), got ", params.slot_rows[bad]);
  const std::vector<int64_t> idle_rows = find_idle_rows(params);
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    clear_rows<T>(params, idle_rows);
    ZEXPERT_DISPATCH(moe_finalize_backward<T>, params)
  });
}

}  // namespace zexpert
