// SPDX-License-Identifier: Apache-2.0
#include "zexpert/biased_topk_backward.h"

#include <limits>

#include "cpu/biased_topk_workspace.h"
#include "cpu/check_params.h"
#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/biased_topk_backward_kernel.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void biased_topk_backward_cpu(const BiasedTopKBackwardParams& params) {
  check_sizes({{"num_tokens", params.num_tokens}});
  if (params.num_tokens == 0) {
    return;
  }
  check_pointers({{"grad_topk_weights", params.grad_topk_weights},
                  {"grad_zero_weight", params.grad_zero_weight},
                  {"logits", params.logits},
                  {"grad_logits", params.grad_logits}});
  if (params.spec.num_constant_experts > 0) {
    check_pointers({{"grad_constant_weight", params.grad_constant_weight}});
  }
  BiasedTopKParams forward;
  forward.logits = params.logits;
  forward.logits_type = params.logits_type;
  forward.logits_row_stride = params.logits_row_stride;
  forward.bias = params.bias;
  forward.bias_type = params.bias_type;
  forward.num_tokens = params.num_tokens;
  forward.spec = params.spec;
  visit_floating(params.logits_type, [&](auto logit) {
    using Logit = decltype(logit);
    using T = accumulate_t<Logit>;
    const int64_t padded_experts = pad_experts(params.spec);
    const AlignedArray<T> bias = convert_bias<T>(forward, padded_experts);
    const SharedByRows<T> shared{forward, bias.get(), padded_experts};
    ZEXPERT_DISPATCH(biased_topk_backward<Logit>, shared, params)
  });
}

}  // namespace zexpert
