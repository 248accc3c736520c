// SPDX-License-Identifier: Apache-2.0
#include "zexpert/zero_expert_accumulate_backward.h"

#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/zero_expert_accumulate_backward_kernel.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void zero_expert_accumulate_backward_cpu(const ZeroExpertAccumulateBackwardParams& params) {
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    ZEXPERT_DISPATCH(zero_expert_accumulate_backward<T>, params)
  });
}

}  // namespace zexpert
