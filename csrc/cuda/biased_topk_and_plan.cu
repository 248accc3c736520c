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
  return params.logits_type != ScalarType::kFloat64 &&
         is_one_launch(device_attribute(cudaDevAttrComputeCapabilityMajor), params.num_tokens, params.spec.num_experts,
                       params.spec.top_k);
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
