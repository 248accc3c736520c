// SPDX-License-Identifier: Apache-2.0
#include "zexpert/silu_and_mul_backward.h"

#include "cpu/check_params.h"
#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/silu_and_mul_backward_kernel.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void silu_and_mul_backward_cpu(const SiluAndMulBackwardParams& params) {
  check_sizes({{"num_rows", params.num_rows}, {"intermediate_size", params.intermediate_size}});
  if (params.num_rows == 0 || params.intermediate_size == 0) {
    return;
  }
  check_pointers({{"grad_out", params.grad_out}, {"gate_up", params.gate_up}, {"grad_gate_up", params.grad_gate_up}});
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    ZEXPERT_DISPATCH(silu_and_mul_backward<T>, params)
  });
}

}  // namespace zexpert
