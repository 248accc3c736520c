#include "zexpert/biased_topk.h"

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/biased_topk_block.cuh"
#include "cuda/biased_topk_warp.cuh"
#include "zexpert/error.h"

namespace zexpert {
namespace {

using cuda::RoutingArguments;

/// Whether vector loads of up to 16 bytes are aligned in every row.
bool fits_vectors(const void* data, int64_t row_stride, int64_t element_size) {
  constexpr int64_t kWidestLoad = 16;
  return reinterpret_cast<uintptr_t>(data) % kWidestLoad == 0 && row_stride * element_size % kWidestLoad == 0;
}

int64_t size_of(ScalarType type) {
  switch (type) {
    case ScalarType::kFloat64:
    case ScalarType::kInt64: return 8;
    case ScalarType::kBFloat16:
    case ScalarType::kFloat16: return 2;
    default: return 4;
  }
}

RoutingArguments kernel_arguments(const BiasedTopKParams& params) {
  const RoutingSpec& spec = params.spec;
  RoutingArguments arguments{};
  arguments.logits = params.logits;
  arguments.logits_row_stride = params.logits_row_stride;
  arguments.bias = params.bias;
  arguments.topk_weights = static_cast<float*>(params.topk_weights);
  arguments.topk_ids = params.topk_ids;
  arguments.zero_weight = static_cast<float*>(params.zero_weight);
  arguments.constant_weight = static_cast<float*>(params.constant_weight);
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
  arguments.ids_are_int64 = params.ids_type == ScalarType::kInt64;
  arguments.renormalize = spec.renormalize;
  arguments.drop_before_renormalize = spec.drop_before_renormalize;
  arguments.logits_fit_vectors = fits_vectors(params.logits, params.logits_row_stride, size_of(params.logits_type));
  arguments.bias_fits_vectors = params.bias_type == ScalarType::kFloat32 && fits_vectors(params.bias, 0, 1);
  return arguments;
}

template <int kWidth>
bool launch_if_width_fits(RoutingArguments& arguments, cudaStream_t stream) {
  if (arguments.num_experts > kWidth) {
    return false;
  }
  // A row that ends before the registers do is loaded element by element.
  const bool is_exact = arguments.num_experts == kWidth;
  arguments.logits_fit_vectors = arguments.logits_fit_vectors && is_exact;
  arguments.bias_fits_vectors = arguments.bias_fits_vectors && is_exact;
  cuda::launch_biased_topk_width<kWidth>(arguments, stream);
  return true;
}

/// Launches the instantiation of the first width that holds the row.
template <int... kWidths>
bool launch_narrowest(RoutingArguments& arguments, cudaStream_t stream) {
  return arguments.top_k <= cuda::kMaxWarpTopK && (launch_if_width_fits<kWidths>(arguments, stream) || ...);
}

template <typename Logit>
void launch_block(const RoutingArguments& arguments, cudaStream_t stream) {
  constexpr int64_t kBlocksPerMultiprocessor = 8;
  const int64_t most = cuda::num_multiprocessors() * kBlocksPerMultiprocessor;
  const auto row_memory = sizeof(unsigned) * static_cast<size_t>(arguments.num_experts + arguments.num_expert_group);
  cuda::launch("biased_topk", &cuda::biased_topk_block<Logit>,
               arguments.num_tokens < most ? arguments.num_tokens : most, cuda::kBlockThreads, row_memory, stream,
               arguments);
}

}  // namespace

void biased_topk_cuda(const BiasedTopKParams& params, cudaStream_t stream) {
  ZEXPERT_CHECK(params.logits_type != ScalarType::kFloat64,
                "logits must be float32, bfloat16 or float16 on CUDA, got float64");
  ZEXPERT_CHECK(params.spec.num_experts <= cuda::kMaxBlockExperts, "logits must have at most ", cuda::kMaxBlockExperts,
                " columns on CUDA, got ", params.spec.num_experts);
  if (params.num_tokens == 0) {
    return;
  }
  RoutingArguments arguments = kernel_arguments(params);
  if (launch_narrowest<128, 192, 256, 384, 512, 576, 768, 896, 1024>(arguments, stream)) {
    return;
  }
  switch (params.logits_type) {
    case ScalarType::kBFloat16: return launch_block<__nv_bfloat16>(arguments, stream);
    case ScalarType::kFloat16: return launch_block<__half>(arguments, stream);
    default: return launch_block<float>(arguments, stream);
  }
}

}  // namespace zexpert
