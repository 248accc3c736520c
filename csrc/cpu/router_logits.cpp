// SPDX-License-Identifier: Apache-2.0
#include "zexpert/router_logits.h"

#include <algorithm>
#include <utility>

#include "cpu/aligned_array.h"
#include "cpu/check_params.h"
#include "zexpert/parallel.h"
#include "zexpert/scale_blocks.h"

namespace zexpert {
namespace {

/// Tokens that are multiplied together, packed as grouped_mlp_product-inl.h wants them.
struct RowGroup {
  int64_t first_row;
  int64_t first_packed_row;
  int64_t num_rows;
};

}  // namespace
}  // namespace zexpert

#define ZEXPERT_KERNEL_FILE "cpu/router_logits_kernel-inl.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void router_logits_cpu(const RouterLogitsParams& params) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    ZEXPERT_DISPATCH(router_logits<T>, params)
  });
}

}  // namespace zexpert
