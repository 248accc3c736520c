// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_finalize.h"

#include <vector>

#include "cpu/index_range.h"
#include "zexpert/error.h"
#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/moe_finalize_kernel.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void moe_finalize_cpu(const MoeFinalizeParams& params) {
  const int64_t bad = find_out_of_range(params.slot_rows, params.num_tokens * params.top_k, -1, params.num_rows);
  ZEXPERT_CHECK(bad < 0, "slot_rows must lie in [-1, ", params.num_rows, "), got ", params.slot_rows[bad]);
  if (params.num_tokens == 0 || params.hidden_size == 0) {
    return;
  }
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    ZEXPERT_DISPATCH(moe_finalize<T>, params)
  });
}

}  // namespace zexpert
