// SPDX-License-Identifier: Apache-2.0
#include "zexpert/zero_expert_accumulate_backward.h"

#include "cpu/check_params.h"
#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/zero_expert_accumulate_backward_kernel.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void zero_expert_accumulate_backward_cpu(const ZeroExpertAccumulateBackwardParams& params) {
  check_sizes({{"num_tokens", params.num_tokens}, {"hidden_size", params.hidden_size}});
  if (params.num_tokens > 0) {
    check_pointers({{"grad_zero_weight", params.grad_zero_weight}});
    if (params.hidden_size > 0) {
      check_pointers({{"grad_out", params.grad_out},
                      {"hidden_states", params.hidden_states},
                      {"zero_weight", params.zero_weight},
                      {"grad_hidden_states", params.grad_hidden_states}});
    }
  }
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    ZEXPERT_DISPATCH(zero_expert_accumulate_backward<T>, params)
  });
}

}  // namespace zexpert
