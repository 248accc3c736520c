// SPDX-License-Identifier: Apache-2.0
// biased_topk_and_plan: what one launch serves.
#include "zexpert/biased_topk_and_plan.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/biased_topk_widths.cuh"

namespace zexpert {
namespace cuda {
namespace {

bool fits_one_cluster(const BiasedTopKParams& params) {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  return (major == 9 || major == 10) && params.num_tokens > 0 && params.num_tokens <= kMaxPlannedTokens &&
         params.num_tokens * params.spec.top_k <= kMaxPlannedSlots && params.logits_type != ScalarType::kFloat64;
}

}  // namespace
}  // namespace cuda

void biased_topk_and_plan_cuda(const BiasedTopKAndPlanParams& params, cudaStream_t stream) {
  const BiasedTopKParams& routing = params.routing;
  if (cuda::fits_one_cluster(routing)) {
    const cuda::PlannedRouting outputs{cuda::routing_outputs(routing), params.plan()};
    cuda::RoutingArguments arguments = cuda::routing_arguments(routing);
    if (cuda::launch_narrowest(arguments, outputs, stream)) {
      return;
    }
  }
  biased_topk_cuda(routing, stream);
  moe_plan_cuda(params.plan(), stream);
}

}  // namespace zexpert
