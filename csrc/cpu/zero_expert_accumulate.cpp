// SPDX-License-Identifier: Apache-2.0
#include "zexpert/zero_expert_accumulate.h"

#include "cpu/check_params.h"
#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/zero_expert_accumulate_kernel.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void zero_expert_accumulate_cpu(const ZeroExpertAccumulateParams& params) {
  check_sizes({{"num_tokens", params.num_tokens}, {"hidden_size", params.hidden_size}});
  if (params.num_tokens == 0 || params.hidden_size == 0) {
    return;
  }
  check_pointers({{"hidden_states", params.hidden_states}, {"zero_weight", params.zero_weight}, {"out", params.out}});
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    ZEXPERT_DISPATCH(zero_expert_accumulate<T>, params)
  });
}

}  // namespace zexpert
