// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_finalize.h"

#include <cstddef>
#include <cstring>
#include <vector>

#include "cpu/check_params.h"
#include "cpu/index_range.h"
#include "zexpert/error.h"
#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/moe_finalize_kernel-inl.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {
namespace {

void check_slot_rows(const int32_t* slot_rows, int64_t num_slots, int64_t num_rows) {
  const int64_t bad = find_out_of_range(slot_rows, num_slots, -1, num_rows);
  ZEXPERT_CHECK(bad < 0, "slot_rows must be in [-1, ", num_rows, "), got ", slot_rows[bad]);
}

/// Sets row_has_slot[r] to whether a slot names row r; returns how many rows no slot names. Throws Error if two slots
/// name one row: they would write its gradient at the same time.
int64_t find_rows_without_slot(const MoeFinalizeBackwardParams& params, uint8_t* row_has_slot) {
  std::fill_n(row_has_slot, params.num_rows, uint8_t{0});
  int64_t num_idle = params.num_rows;
  for (int64_t slot = 0; slot < params.num_tokens * params.top_k; ++slot) {
    const int32_t row = params.slot_rows[slot];
    if (row >= 0) {
      ZEXPERT_CHECK(row_has_slot[row] == 0, "slot_rows must name every row at most once, got ", row, " twice");
      row_has_slot[row] = 1;
      --num_idle;
    }
  }
  return num_idle;
}

void zero_rows_without_slot(const MoeFinalizeBackwardParams& params, int64_t element_size,
                            const uint8_t* row_has_slot) {
  // Below this many bytes a range costs less than waking a thread.
  constexpr int64_t kGrainBytes = 128 * 1024;
  const int64_t row_bytes = params.hidden_size * element_size;
  auto* grad_rows = static_cast<char*>(params.grad_rows);
  const int64_t grain_size = std::max<int64_t>(kGrainBytes / std::max<int64_t>(row_bytes, 1), 1);
  parallel_for(0, params.num_rows, grain_size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (row_has_slot[row] == 0 && row_bytes > 0) {
        std::memset(grad_rows + row * row_bytes, 0, static_cast<size_t>(row_bytes));
      }
    }
  });
}

}  // namespace

void moe_finalize_cpu(const MoeFinalizeParams& params) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  check_slot_rows(params.slot_rows, params.num_tokens * params.top_k, params.num_rows);
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    if (params.is_zero_part_alone()) {
      ZEXPERT_DISPATCH(scale_hidden_states<T>, params)
    } else {
      ZEXPERT_DISPATCH(moe_finalize<T>, params)
    }
  });
}

void moe_finalize_backward_cpu(const MoeFinalizeBackwardParams& params) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  check_slot_rows(params.slot_rows, params.num_tokens * params.top_k, params.num_rows);
  auto* row_has_slot = static_cast<uint8_t*>(params.workspace);
  const int64_t num_idle = find_rows_without_slot(params, row_has_slot);
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    if (num_idle > 0) {
      zero_rows_without_slot(params, sizeof(T), row_has_slot);
    }
    ZEXPERT_DISPATCH(moe_finalize_backward<T>, params)
  });
}

}  // namespace zexpert
