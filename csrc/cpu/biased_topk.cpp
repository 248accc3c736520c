// SPDX-License-Identifier: Apache-2.0
#include "zexpert/biased_topk.h"

#include <limits>

#include "cpu/biased_topk_workspace.h"
#include "cpu/check_params.h"
#include "zexpert/error.h"
#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/biased_topk_kernel.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

namespace {

void check_params(const BiasedTopKParams& params) {
  const RoutingSpec& spec = params.spec;
  spec.validate();
  ZEXPERT_CHECK(spec.num_experts != kFromLogits && spec.num_identity_experts != kFromLogits,
                "spec must be resolved by RoutingSpec::for_width, got an open count of experts");
  ZEXPERT_CHECK(params.ids_type == ScalarType::kInt32 || params.ids_type == ScalarType::kInt64,
                "topk_ids must be int32 or int64, got ", name(params.ids_type));
  check_sizes({{"num_tokens", params.num_tokens}});
  if (params.num_tokens > 0) {
    check_pointers({{"logits", params.logits},
                    {"topk_weights", params.topk_weights},
                    {"topk_ids", params.topk_ids},
                    {"zero_weight", params.zero_weight}});
    if (spec.num_constant_experts > 0) {
      check_pointers({{"constant_weight", params.constant_weight}});
    }
  }
}

}  // namespace

void biased_topk_cpu(const BiasedTopKParams& params) {
  check_params(params);
  if (params.num_tokens == 0) {
    return;
  }
  visit_floating(params.logits_type, [&](auto logit) {
    using Logit = decltype(logit);
    using T = accumulate_t<Logit>;
    const int64_t padded_experts = pad_experts(params.spec);
    const AlignedArray<T> bias = convert_bias<T>(params, padded_experts);
    const SharedByRows<T> shared{params, bias.get(), padded_experts};
    ZEXPERT_DISPATCH(biased_topk<Logit>, shared)
  });
}

}  // namespace zexpert
