// SPDX-License-Identifier: Apache-2.0
// biased_topk and its backward: which kernel routes which shape.
#include "zexpert/biased_topk.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/biased_topk/block.cuh"
#include "cuda/biased_topk/widths.cuh"
#include "zexpert/error.h"

namespace zexpert {
namespace cuda {
namespace {

/// What the CUDA kernels do not compute, though the CPU does.
void check_for_cuda(const RoutingInputs& inputs) {
  ZEXPERT_CHECK(inputs.logits_type != ScalarType::kFloat64,
                "logits must be float32, bfloat16 or float16 on CUDA, got float64");
  ZEXPERT_CHECK(inputs.spec.num_logits <= kMaxExpertsOnCuda, "logits must have at most ", kMaxExpertsOnCuda,
                " columns on CUDA, got ", inputs.spec.num_logits);
}

template <typename Logit, typename Outputs>
void launch_block(const RoutingArguments& arguments, const Outputs& outputs, cudaStream_t stream) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  const int64_t most = num_multiprocessors() * kBlocksPerMultiprocessor;
  const auto row_memory = sizeof(unsigned) * static_cast<size_t>(arguments.num_experts + arguments.num_expert_group);
  launch("biased_topk", &biased_topk_block<Logit, Outputs>, std::min(arguments.num_tokens, most), kBlockThreads,
         row_memory, stream, arguments, outputs);
}

/// The kernel for the shape. It is the same for RoutingOutputs and RoutingGradients, so that forward and backward
/// choose the same experts.
template <typename Outputs>
void launch_biased_topk(const RoutingInputs& inputs, const Outputs& outputs, cudaStream_t stream) {
  RoutingArguments arguments = routing_arguments(inputs);
  if (!launch_narrowest(arguments, outputs, stream)) {
    visit_data_type(inputs.logits_type, [&](auto logit) { launch_block<decltype(logit)>(arguments, outputs, stream); });
  }
}

/// Routing and plan in one launch; false if the device or the sizes need two.
bool launch_together(const BiasedTopKParams& params, const RoutingOutputs& outputs, cudaStream_t stream) {
  if (!is_one_launch(device_attribute(cudaDevAttrComputeCapabilityMajor), params.num_tokens, params.spec.num_logits,
                     params.spec.top_k)) {
    return false;
  }
  RoutingArguments arguments = routing_arguments(params);
  return launch_narrowest(arguments, PlannedRouting{outputs, params.plan()}, stream);
}

}  // namespace
}  // namespace cuda

void biased_topk_cuda(const BiasedTopKParams& params, cudaStream_t stream) {
  params.validate();
  cuda::check_for_cuda(params);
  if (biased_topk_cuda_workspace_bytes(params) > 0) {
    detail::check_pointers({{"workspace", params.workspace}});
  }
  if (params.num_tokens > 0) {
    const cuda::RoutingOutputs outputs = cuda::routing_outputs(params);
    if (params.has_plan() && cuda::launch_together(params, outputs, stream)) {
      return;
    }
    cuda::launch_biased_topk(params, outputs, stream);
  }
  if (params.has_plan()) {
    moe_plan_cuda(params.plan(), stream);
  }
}

void biased_topk_choices_cuda(const BiasedTopKChoicesParams& params, cudaStream_t stream) {
  params.validate();
  cuda::check_for_cuda(params);
  if (params.num_tokens > 0) {
    cuda::RoutingOutputs outputs{};
    outputs.chosen = params.chosen;
    cuda::launch_biased_topk(params, outputs, stream);
  }
}

void biased_topk_backward_cuda(const BiasedTopKBackwardParams& params, cudaStream_t stream) {
  params.validate();
  cuda::check_for_cuda(params);
  if (params.num_tokens == 0) {
    return;
  }
  cuda::RoutingGradients gradients{};
  gradients.topk_weights = static_cast<const float*>(params.grad_topk_weights);
  gradients.zero_weight = static_cast<const float*>(params.grad_zero_weight);
  gradients.constant_weight = static_cast<const float*>(params.grad_constant_weight);
  gradients.logits = params.grad_logits;
  cuda::launch_biased_topk(params, gradients, stream);
}

}  // namespace zexpert
