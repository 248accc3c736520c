// SPDX-License-Identifier: Apache-2.0
#include "zexpert/quantize_blockwise.h"

#include <cmath>
#include <vector>

#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/quantize_blockwise_kernel-inl.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void quantize_blockwise_cpu(const QuantizeBlockwiseParams& params) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  const int64_t num_blocks = num_scale_blocks(params.num_rows) * num_scale_blocks(params.num_columns);
  std::vector<uint32_t> largest_bits(static_cast<size_t>(params.num_matrices * num_blocks));
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    ZEXPERT_DISPATCH(find_largest<T>, params, largest_bits.data())
    for (const uint32_t bits : largest_bits) {
      const auto magnitude = detail::bit_cast<float>(bits);
      ZEXPERT_CHECK(std::isfinite(magnitude), "weight must be finite, got ", std::isnan(magnitude) ? "nan" : "inf");
    }
    ZEXPERT_DISPATCH(quantize_blockwise<T>, params, largest_bits.data())
  });
}

}  // namespace zexpert
