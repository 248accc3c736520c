// SPDX-License-Identifier: Apache-2.0
#include "zexpert/dequantize_blockwise.h"

#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/dequantize_blockwise_kernel-inl.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void dequantize_blockwise_cpu(const DequantizeBlockwiseParams& params) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    ZEXPERT_DISPATCH(dequantize_blockwise<T>, params)
  });
}

}  // namespace zexpert
