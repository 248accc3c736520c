// SPDX-License-Identifier: Apache-2.0
#include "zexpert/biased_topk.h"

#include <limits>
#include <vector>

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

/// Throws Error unless given choices are experts, or -1 for empty slots, and no token names an expert twice.
void check_choices(const RoutingInputs& inputs) {
  if (inputs.choices == nullptr) {
    return;
  }
  const RoutingSpec& spec = inputs.spec;
  std::vector<int64_t> last_token(static_cast<size_t>(spec.num_logits), -1);
  for (int64_t token = 0; token < inputs.num_tokens; ++token) {
    for (int64_t k = 0; k < spec.top_k; ++k) {
      const int32_t expert = inputs.choices[token * spec.top_k + k];
      ZEXPERT_CHECK(expert >= -1 && expert < spec.num_logits, "choices must be experts from 0 to ", spec.num_logits - 1,
                    ", or -1 for an empty slot, got ", expert, " for token ", token);
      if (expert >= 0) {
        int64_t& last = last_token[static_cast<size_t>(expert)];
        ZEXPERT_CHECK(last != token, "choices must name an expert once per token, got ", expert, " twice for token ",
                      token);
        last = token;
      }
    }
  }
}

}  // namespace

void biased_topk_cpu(const BiasedTopKParams& params) {
  params.validate();
  check_choices(params);
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

void biased_topk_choices_cpu(const BiasedTopKChoicesParams& params) {
  params.validate();
  check_choices(params);
  if (params.num_tokens > 0) {
    with_shared_by_rows(params, [&](auto logit, const auto& shared) {
      using Logit = decltype(logit);
      ZEXPERT_DISPATCH(biased_topk_choices<Logit>, shared, params)
    });
  }
}

void biased_topk_backward_cpu(const BiasedTopKBackwardParams& params) {
  params.validate();
  check_choices(params);
  if (params.num_tokens > 0) {
    with_shared_by_rows(params, [&](auto logit, const auto& shared) {
      using Logit = decltype(logit);
      ZEXPERT_DISPATCH(biased_topk_backward<Logit>, shared, params)
    });
  }
}

}  // namespace zexpert
