// SPDX-License-Identifier: Apache-2.0
#include "zexpert/silu_and_mul.h"

#include "cpu/check_params.h"
#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/silu_and_mul_kernel-inl.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void silu_and_mul_cpu(const SiluAndMulParams& params) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  const int64_t num_rows = num_working_rows(params.last_offset, params.num_rows);
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    ZEXPERT_DISPATCH(silu_and_mul<T>, params, num_rows)
  });
}

void silu_and_mul_backward_cpu(const SiluAndMulBackwardParams& params) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  const int64_t num_rows = num_working_rows(params.last_offset, params.num_rows);
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    ZEXPERT_DISPATCH(silu_and_mul_backward<T>, params, num_rows)
  });
}

}  // namespace zexpert
