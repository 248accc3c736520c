// SPDX-License-Identifier: Apache-2.0
#include "zexpert/zero_idle.h"

#include <algorithm>

namespace zexpert {

void zero_idle_experts_cpu(const ZeroIdleExpertsParams& params) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    for (int64_t expert = 0; expert < params.num_experts; ++expert) {
      if (params.expert_offsets[expert] >= params.expert_offsets[expert + 1]) {
        std::fill_n(static_cast<T*>(params.data) + expert * params.expert_size, params.expert_size, T{});
      }
    }
  });
}

void zero_idle_rows_cpu(const ZeroIdleRowsParams& params) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  const int64_t first = std::clamp<int64_t>(*params.last_offset, 0, params.num_rows);
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    std::fill_n(static_cast<T*>(params.data) + first * params.row_size, (params.num_rows - first) * params.row_size,
                T{});
  });
}

}  // namespace zexpert
