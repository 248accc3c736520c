// SPDX-License-Identifier: Apache-2.0
// The widths of rows for which the kernels of warp.cuh and and_plan.cuh are compiled, a file for each width.
#pragma once

#include <cuda_runtime.h>

#include "cuda/biased_topk/and_plan.cuh"
#include "cuda/biased_topk/warp.cuh"
#include "zexpert/biased_topk.h"

namespace zexpert::cuda {

inline RoutingArguments routing_arguments(const RoutingInputs& inputs) {
  const RoutingSpec& spec = inputs.spec;
  RoutingArguments arguments{};
  arguments.logits = inputs.logits;
  arguments.logits_row_stride = inputs.row_stride();
  arguments.bias = inputs.choices == nullptr ? inputs.bias : nullptr;  // it affects the choice alone
  arguments.choices = inputs.choices;
  arguments.num_tokens = inputs.num_tokens;
  arguments.num_experts = static_cast<int>(spec.num_logits);
  arguments.top_k = static_cast<int>(spec.top_k);
  arguments.num_real_experts = static_cast<int>(spec.num_real_experts);
  arguments.first_constant = static_cast<int>(spec.num_real_experts + spec.num_identity_experts);
  arguments.first_drop = arguments.first_constant + static_cast<int>(spec.num_constant_experts);
  arguments.num_expert_group = static_cast<int>(spec.num_expert_group);
  arguments.topk_group = static_cast<int>(spec.topk_group);
  arguments.routed_scaling_factor = static_cast<float>(spec.routed_scaling_factor);
  arguments.logits_type = inputs.logits_type;
  arguments.bias_type = inputs.bias_type;
  arguments.scoring_func = spec.scoring_func;
  arguments.renormalize = spec.renormalize;
  arguments.drop_before_renormalize = spec.drop_before_renormalize;
  visit_data_type(inputs.logits_type, [&](auto logit) {
    arguments.logits_fit_vectors = fits_vectors(inputs.logits, inputs.row_stride(), sizeof(logit));
  });
  arguments.bias_fits_vectors = inputs.bias_type == ScalarType::kFloat32 && fits_vectors(inputs.bias, 0, 0);
  return arguments;
}

inline RoutingOutputs routing_outputs(const BiasedTopKParams& params) {
  RoutingOutputs outputs{};
  outputs.topk_weights = static_cast<float*>(params.topk_weights);
  outputs.topk_ids = params.topk_ids;
  outputs.zero_weight = static_cast<float*>(params.zero_weight);
  outputs.constant_weight = static_cast<float*>(params.constant_weight);
  outputs.ids_are_int64 = params.ids_type == ScalarType::kInt64;
  return outputs;
}

/// The file of the width defines it, with kernels for every type of logits.
template <int kWidth, typename Outputs>
void launch_biased_topk_width(const RoutingArguments& arguments, const Outputs& outputs, cudaStream_t stream);

template <int kWidth, typename Outputs>
bool launch_if_width_fits(RoutingArguments& arguments, const Outputs& outputs, cudaStream_t stream) {
  if (arguments.num_experts > kWidth) {
    return false;
  }
  // A row narrower than the registers is loaded element by element.
  const bool is_exact = arguments.num_experts == kWidth;
  arguments.logits_fit_vectors = arguments.logits_fit_vectors && is_exact;
  arguments.bias_fits_vectors = arguments.bias_fits_vectors && is_exact;
  launch_biased_topk_width<kWidth>(arguments, outputs, stream);
  return true;
}

template <int... kWidths, typename Outputs>
bool launch_first_that_fits(RoutingArguments& arguments, const Outputs& outputs, cudaStream_t stream) {
  return (launch_if_width_fits<kWidths>(arguments, outputs, stream) || ...);
}

/// Launches the kernel of the first width that holds the row; false if the row does not fit a warp.
template <typename Outputs>
bool launch_narrowest(RoutingArguments& arguments, const Outputs& outputs, cudaStream_t stream) {
  return fits_warp(arguments.num_experts, arguments.top_k) &&
         launch_first_that_fits<128, 192, 256, 384, 512, 576, 768, 896, kMaxWarpExperts>(arguments, outputs, stream);
}

#define ZEXPERT_DEFINE_BIASED_TOPK_WIDTH(width)                                                                   \
  namespace zexpert::cuda {                                                                                       \
  template <int kWidth, typename Outputs>                                                                         \
  void launch_biased_topk_width(const RoutingArguments& arguments, const Outputs& outputs, cudaStream_t stream) { \
    visit_data_type(arguments.logits_type, [&](auto logit) {                                                      \
      launch_biased_topk_warp<decltype(logit), kWidth>(arguments, outputs, stream);                               \
    });                                                                                                           \
  }                                                                                                               \
  template void launch_biased_topk_width<width>(const RoutingArguments&, const RoutingOutputs&, cudaStream_t);    \
  template void launch_biased_topk_width<width>(const RoutingArguments&, const RoutingGradients&, cudaStream_t);  \
  template void launch_biased_topk_width<width>(const RoutingArguments&, const PlannedRouting&, cudaStream_t);    \
  }

}  // namespace zexpert::cuda
