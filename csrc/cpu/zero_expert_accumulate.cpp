// SPDX-License-Identifier: Apache-2.0
#include "zexpert/zero_expert_accumulate.h"

#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/zero_expert_accumulate_kernel.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void zero_expert_accumulate_cpu(const ZeroExpertAccumulateParams& params) {
  if (params.num_tokens == 0 || params.hidden_size == 0) {
    return;
  }
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    ZEXPERT_DISPATCH(zero_expert_accumulate<T>, params)
  });
}

}  // namespace zexpert
