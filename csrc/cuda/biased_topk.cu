// biased_topk and its backward: which kernel serves which shape.
#include "zexpert/biased_topk.h"

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/biased_topk_block.cuh"
#include "cuda/biased_topk_warp.cuh"
#include "zexpert/biased_topk_backward.h"
#include "zexpert/error.h"

namespace zexpert {
namespace cuda {
namespace {

/// What forward and backward parameters have in common.
template <typename Params>
RoutingArguments routing_arguments(const Params& params) {
  const RoutingSpec& spec = params.spec;
  RoutingArguments arguments{};
  arguments.logits = params.logits;
  arguments.logits_row_stride = params.logits_row_stride;
  arguments.bias = params.bias;
  arguments.num_tokens = params.num_tokens;
  arguments.num_experts = static_cast<int>(spec.num_experts);
  arguments.top_k = static_cast<int>(spec.top_k);
  arguments.num_real_experts = static_cast<int>(spec.num_real_experts);
  arguments.first_constant = static_cast<int>(spec.num_real_experts + spec.num_identity_experts);
  arguments.first_drop = arguments.first_constant + static_cast<int>(spec.num_constant_experts);
  arguments.num_expert_group = static_cast<int>(spec.num_expert_group);
  arguments.topk_group = static_cast<int>(spec.topk_group);
  arguments.routed_scaling_factor = static_cast<float>(spec.routed_scaling_factor);
  arguments.logits_type = params.logits_type;
  arguments.bias_type = params.bias_type;
  arguments.scoring_func = spec.scoring_func;
  arguments.renormalize = spec.renormalize;
  arguments.drop_before_renormalize = spec.drop_before_renormalize;
  visit_data_type(params.logits_type, [&](auto logit) {
    arguments.logits_fit_vectors = fits_vectors(params.logits, params.logits_row_stride, sizeof(logit));
  });
  arguments.bias_fits_vectors = params.bias_type == ScalarType::kFloat32 && fits_vectors(params.bias, 0, 0);
  return arguments;
}

template <int kWidth, typename Outputs>
bool launch_if_width_fits(RoutingArguments& arguments, const Outputs& outputs, cudaStream_t stream) {
  if (arguments.num_experts > kWidth) {
    return false;
  }
  // A row that ends before the registers do is loaded element by element.
  const bool is_exact = arguments.num_experts == kWidth;
  arguments.logits_fit_vectors = arguments.logits_fit_vectors && is_exact;
  arguments.bias_fits_vectors = arguments.bias_fits_vectors && is_exact;
  launch_biased_topk_width<kWidth>(arguments, outputs, stream);
  return true;
}

/// Launches the instantiation of the first width that holds the row.
template <int... kWidths, typename Outputs>
bool launch_narrowest(RoutingArguments& arguments, const Outputs& outputs, cudaStream_t stream) {
  return arguments.top_k <= kMaxWarpTopK && (launch_if_width_fits<kWidths>(arguments, outputs, stream) || ...);
}

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
  ZEXPERT_CHECK(params.spec.num_experts <= kMaxBlockExperts, "logits must have at most ", kMaxBlockExperts,
                " columns on CUDA, got ", params.spec.num_experts);
  if (params.num_tokens == 0) {
    return;
  }
  RoutingArguments arguments = routing_arguments(params);
  if (!launch_narrowest<128, 192, 256, 384, 512, 576, 768, 896, 1024>(arguments, outputs, stream)) {
    visit_data_type(params.logits_type, [&](auto logit) { launch_block<decltype(logit)>(arguments, outputs, stream); });
  }
}

}  // namespace
}  // namespace cuda

void biased_topk_cuda(const BiasedTopKParams& params, cudaStream_t stream) {
  cuda::RoutingOutputs outputs{};
  outputs.topk_weights = static_cast<float*>(params.topk_weights);
  outputs.topk_ids = params.topk_ids;
  outputs.zero_weight = static_cast<float*>(params.zero_weight);
  outputs.constant_weight = static_cast<float*>(params.constant_weight);
  outputs.ids_are_int64 = params.ids_type == ScalarType::kInt64;
  cuda::launch_biased_topk(params, outputs, stream);
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
