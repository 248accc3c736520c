// SPDX-License-Identifier: Apache-2.0
// biased_topk and its backward: which kernel serves which shape.
#include "zexpert/biased_topk.h"

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/biased_topk_block.cuh"
#include "cuda/biased_topk_widths.cuh"
#include "zexpert/biased_topk_backward.h"
#include "zexpert/error.h"

namespace zexpert {
namespace cuda {
namespace {

template <typename Logit, typename Outputs>
void launch_block(const RoutingArguments& arguments, const Outputs& outputs, cudaStream_t stream) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  const int64_t most = num_multiprocessors() * kBlocksPerMultiprocessor;
  const auto row_memory = sizeof(unsigned) * static_cast<size_t>(arguments.num_experts + arguments.num_expert_group);
  launch("biased_topk", &biased_topk_block<Logit, Outputs>, arguments.num_tokens < most ? arguments.num_tokens : most,
         kBlockThreads, row_memory, stream, arguments, outputs);
}

/// The kernel for the spec's shape; the same for both kinds of outputs, so that both see the same choice.
template <typename Params, typename Outputs>
void launch_biased_topk(const Params& params, const Outputs& outputs, cudaStream_t stream) {
  ZEXPERT_CHECK(params.logits_type != ScalarType::kFloat64,
                "logits must be float32, bfloat16 or float16 on CUDA, got float64");
  ZEXPERT_CHECK(params.spec.num_experts <= kMaxExpertsOnCuda, "logits must have at most ", kMaxExpertsOnCuda,
                " columns on CUDA, got ", params.spec.num_experts);
  if (params.num_tokens == 0) {
    return;
  }
  RoutingArguments arguments = routing_arguments(params);
  if (!launch_narrowest(arguments, outputs, stream)) {
    visit_data_type(params.logits_type, [&](auto logit) { launch_block<decltype(logit)>(arguments, outputs, stream); });
  }
}

}  // namespace
}  // namespace cuda

void biased_topk_cuda(const BiasedTopKParams& params, cudaStream_t stream) {
  cuda::launch_biased_topk(params, cuda::routing_outputs(params), stream);
}

void biased_topk_backward_cuda(const BiasedTopKBackwardParams& params, cudaStream_t stream) {
  cuda::RoutingGradients gradients{};
  gradients.topk_weights = static_cast<const float*>(params.grad_topk_weights);
  gradients.zero_weight = static_cast<const float*>(params.grad_zero_weight);
  gradients.constant_weight = static_cast<const float*>(params.grad_constant_weight);
  gradients.logits = params.grad_logits;
  cuda::launch_biased_topk(params, gradients, stream);
}

}  // namespace zexpert
