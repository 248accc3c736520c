#include "zexpert/biased_topk.h"

#include <limits>

#include "cpu/biased_topk_workspace.h"
#include "zexpert/parallel.h"

#define ZEXPERT_KERNEL_FILE "cpu/biased_topk_kernel.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void biased_topk_cpu(const BiasedTopKParams& params) {
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
