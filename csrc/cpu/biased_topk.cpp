// SPDX-License-Identifier: Apache-2.0
#include "zexpert/biased_topk.h"

#include <limits>

#include "cpu/biased_topk_workspace.h"
#include "zexpert/enums.h"
#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/biased_topk_kernel-inl.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {
namespace {

/// Calls fn(a logit, what all rows share).
template <typename Fn>
void with_shared_by_rows(const RoutingInputs& inputs, const Fn& fn) {
  visit_floating(inputs.logits_type, [&](auto logit) {
    using T = accumulate_t<decltype(logit)>;
    const int64_t padded_experts = pad_experts(inputs.spec);
    const AlignedArray<T> bias = convert_bias<T>(inputs, padded_experts);
    fn(logit, SharedByRows<T>{inputs, bias.get(), padded_experts});
  });
}

}  // namespace

void biased_topk_cpu(const BiasedTopKParams& params) {
  params.validate();
  if (params.num_tokens > 0) {
    with_shared_by_rows(params, [&](auto logit, const auto& shared) {
      using Logit = decltype(logit);
      ZEXPERT_DISPATCH(biased_topk<Logit>, shared, params)
    });
  }
  if (params.has_plan()) {
    moe_plan_cpu(params.plan());
  }
}

void biased_topk_backward_cpu(const BiasedTopKBackwardParams& params) {
  params.validate();
  if (params.num_tokens > 0) {
    with_shared_by_rows(params, [&](auto logit, const auto& shared) {
      using Logit = decltype(logit);
      ZEXPERT_DISPATCH(biased_topk_backward<Logit>, shared, params)
    });
  }
}

}  // namespace zexpert
