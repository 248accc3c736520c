// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_finalize.h"

#include <vector>

#include "cpu/check_params.h"
#include "cpu/index_range.h"
#include "zexpert/error.h"
#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/moe_finalize_kernel.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void moe_finalize_cpu(const MoeFinalizeParams& params) {
  check_sizes({{"num_rows", params.num_rows},
               {"num_tokens", params.num_tokens},
               {"top_k", params.top_k},
               {"num_constant_experts", params.num_constant_experts},
               {"hidden_size", params.hidden_size}});
  if (params.num_tokens * params.top_k > 0) {
    check_pointers({{"slot_rows", params.slot_rows}, {"topk_weights", params.topk_weights}});
  }
  const int64_t bad = find_out_of_range(params.slot_rows, params.num_tokens * params.top_k, -1, params.num_rows);
  ZEXPERT_CHECK(bad < 0, "slot_rows must lie in [-1, ", params.num_rows, "), got ", params.slot_rows[bad]);
  if (params.num_tokens == 0 || params.hidden_size == 0) {
    return;
  }
  check_pointers({{"hidden_states", params.hidden_states}, {"zero_weight", params.zero_weight}, {"out", params.out}});
  if (params.num_rows > 0) {
    check_pointers({{"rows", params.rows}});
  }
  if (params.num_constant_experts > 0) {
    check_pointers({{"constant_weight", params.constant_weight}, {"constant_vectors", params.constant_vectors}});
  }
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    ZEXPERT_DISPATCH(moe_finalize<T>, params)
  });
}

}  // namespace zexpert
