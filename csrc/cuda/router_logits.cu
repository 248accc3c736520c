// SPDX-License-Identifier: Apache-2.0
// router_logits on CUDA: Hopper's matrix units where they serve, float32 arithmetic elsewhere. Both cut the depth into
// the same groups, so that one kernel adds the partial sums of either.
#include "zexpert/router_logits.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/router_logits_hopper.h"
#include "cuda/router_logits_layout.h"
#include "cuda/types.cuh"
#include "cuda/vector.cuh"

namespace zexpert {
namespace cuda::router {
namespace {

// Float32 arithmetic: a block for a tile of experts and tokens, and for all groups or one
constexpr int kTile = 64;
constexpr int kTileDepth = 16;
constexpr int kTileStride = kTile + 4;  // stores of neighbouring depths reach other banks, and rows stay aligned
constexpr int kTileThreads = 256;
constexpr int kOwn = 4;  // experts and tokens of a thread
constexpr int kLoads = kTile * kTileDepth / kTileThreads;

struct Float32Arguments {
  RouterLogitsParams params;
  float* out;
  int num_expert_tiles;
  int num_token_tiles;
  int groups_per_block;
};

/// A thread's share of one operand of a step: elements of depth threadIdx.x % kTileDepth.
template <typename T>
struct Share {
  float values[kLoads];

  __device__ __forceinline__ void load(const T* matrix, int64_t row_stride, int64_t first_row, int64_t num_rows,
                                       int64_t first_depth, int64_t depth) {
    const int64_t column = first_depth + threadIdx.x % kTileDepth;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t row = first_row + (threadIdx.x + i * kTileThreads) / kTileDepth;
      values[i] = row < num_rows && column < depth ? to_float(matrix[row * row_stride + column]) : 0.0F;
    }
  }
  __device__ __forceinline__ void store(float (&tile)[kTileDepth][kTileStride]) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      tile[threadIdx.x % kTileDepth][(threadIdx.x + i * kTileThreads) / kTileDepth] = values[i];
  }
};

template <typename T>
__global__ void __launch_bounds__(kTileThreads) multiply_in_float32(const Float32Arguments arguments) {
  __shared__ alignas(16) float tokens_tile[2][kTileDepth][kTileStride];
  __shared__ alignas(16) float experts_tile[2][kTileDepth][kTileStride];
  wait_for_previous_kernels();
  let_next_kernel_start();
  const RouterLogitsParams& params = arguments.params;
  const auto block = static_cast<int>(blockIdx.x);
  const int64_t first_expert = int64_t{kTile} * (block % arguments.num_expert_tiles);
  const int64_t first_token = int64_t{kTile} * (block / arguments.num_expert_tiles % arguments.num_token_tiles);
  const int first_group = block / arguments.num_expert_tiles / arguments.num_token_tiles * arguments.groups_per_block;
  const auto num_steps = static_cast<int>(divide_up(params.hidden_size, kStepDepth));
  const int own_expert = static_cast<int>(threadIdx.x) % (kTile / kOwn) * kOwn;
  const int own_token = static_cast<int>(threadIdx.x) / (kTile / kOwn) * kOwn;

  float totals[kOwn][kOwn] = {};
  for (int group = first_group; group < first_group + arguments.groups_per_block; ++group) {
    const int64_t begin = int64_t{kStepDepth} * first_step(group, num_steps);
    const int64_t end = int64_t{kStepDepth} * first_step(group + 1, num_steps);
    Share<T> tokens;
    Share<float> experts;
    const auto load = [&](int64_t depth) {
      tokens.load(static_cast<const T*>(params.hidden_states), params.hidden_row_stride, first_token, params.num_tokens,
                  depth, params.hidden_size);
      experts.load(static_cast<const float*>(params.weight), params.weight_row_stride, first_expert, params.num_experts,
                   depth, params.hidden_size);
    };
    float sums[kOwn][kOwn] = {};
    int buffer = 0;
    load(begin);
    for (int64_t depth = begin; depth < end; depth += kTileDepth, buffer ^= 1) {
      tokens.store(tokens_tile[buffer]);
      experts.store(experts_tile[buffer]);
      __syncthreads();  // two buffers: who stores next has met those that read the same buffer before at this barrier
      if (depth + kTileDepth < end)
        load(depth + kTileDepth);
#pragma unroll
      for (int k = 0; k < kTileDepth; ++k) {
        const float4 x = *reinterpret_cast<const float4*>(&tokens_tile[buffer][k][own_token]);
        const float4 w = *reinterpret_cast<const float4*>(&experts_tile[buffer][k][own_expert]);
        const float xs[kOwn] = {x.x, x.y, x.z, x.w};
        const float ws[kOwn] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int t = 0; t < kOwn; ++t) {
#pragma unroll
          for (int e = 0; e < kOwn; ++e) sums[t][e] = fmaf(xs[t], ws[e], sums[t][e]);
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int t = 0; t < kOwn; ++t) {
#pragma unroll
      for (int e = 0; e < kOwn; ++e) totals[t][e] += sums[t][e];
    }
  }
  float* const out = arguments.out + int64_t{first_group} * params.num_tokens * params.num_experts;
#pragma unroll
  for (int t = 0; t < kOwn; ++t) {
#pragma unroll
    for (int e = 0; e < kOwn; ++e) {
      const int64_t token = first_token + own_token + t;
      const int64_t expert = first_expert + own_expert + e;
      if (token < params.num_tokens && expert < params.num_experts)
        out[token * params.num_experts + expert] = totals[t][e];
    }
  }
}

constexpr int kSumThreads = 256;

/// logits[i] = the sum of partial_sums[g, i], g = 0 .. kGroups - 1, in this order. A thread per kVector logits.
template <int kVector>
__global__ void __launch_bounds__(kSumThreads) add_groups(const float* partial_sums, float* logits, int64_t size) {
  using Elements = Vector<float, kVector>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t i = (int64_t{blockIdx.x} * kSumThreads + threadIdx.x) * kVector;
  if (i >= size)
    return;
  Elements parts[kGroups];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) parts[g] = *reinterpret_cast<const Elements*>(partial_sums + g * size + i);
  Elements sums{};
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) sums.values[v] += parts[g].values[v];
  }
  *reinterpret_cast<Elements*>(logits + i) = sums;
}

void add_all_groups(const RouterLogitsParams& params, const float* partial_sums, cudaStream_t stream) {
  const int64_t size = params.num_tokens * params.num_experts;
  auto* const logits = static_cast<float*>(params.logits);
  visit_vector<float>(fits_vectors(logits, 0, sizeof(float)), size, [&](auto vector) {
    constexpr int kVector = decltype(vector)::value;
    const int64_t num_blocks = divide_up(size, int64_t{kSumThreads} * kVector);
    launch("router_logits", &add_groups<kVector>, num_blocks, kSumThreads, 0, stream, partial_sums, logits, size);
  });
}

Float32Arguments float32_arguments(const RouterLogitsParams& params) {
  Float32Arguments arguments{};
  arguments.params = params;
  arguments.num_expert_tiles = static_cast<int>(divide_up(params.num_experts, kTile));
  arguments.num_token_tiles = static_cast<int>(divide_up(params.num_tokens, kTile));
  const int64_t num_tiles = int64_t{arguments.num_expert_tiles} * arguments.num_token_tiles;
  arguments.groups_per_block = num_tiles < 4 * int64_t{num_multiprocessors()} ? 1 : kGroups;
  return arguments;
}

/// Regions of the workspace, each aligned to 256 bytes. Those of 0 bytes are not needed.
struct Regions {
  int64_t partial_sums = 0;
  int64_t parts = 0;
  int64_t inverse_scales = 0;
  int64_t has_scales = 0;

  explicit Regions(const RouterLogitsParams& params) {
    constexpr int64_t kAlignment = 256;
    const auto aligned = [](int64_t bytes) { return divide_up(bytes, kAlignment) * kAlignment; };
    const bool on_hopper = router_logits_uses_wgmma(params);
    const Mode mode = choose_mode(params.num_tokens, params.num_experts, params.hidden_size, num_multiprocessors());
    if (on_hopper ? mode == Mode::kSome : float32_arguments(params).groups_per_block == 1)
      partial_sums = aligned(4 * kGroups * params.num_tokens * params.num_experts);
    if (on_hopper && mode != Mode::kFew) {
      const int64_t num_steps = divide_up(params.hidden_size, kStepDepth);
      const int64_t num_tiles = divide_up(params.num_experts, kManyExperts);
      parts = aligned(2 * kParts * params.num_experts * params.hidden_size);
      inverse_scales = aligned(4 * num_steps * num_tiles * kManyExperts);
      has_scales = aligned(4 * num_steps * num_tiles);
    }
  }
  int64_t num_bytes() const { return partial_sums + parts + inverse_scales + has_scales; }
};

}  // namespace
}  // namespace cuda::router

bool router_logits_uses_wgmma(const RouterLogitsParams& params) {
  return (params.data_type == ScalarType::kBFloat16 || params.data_type == ScalarType::kFloat16) &&
         params.hidden_size > 0 && params.hidden_size % 8 == 0 &&
         cuda::fits_vectors(params.hidden_states, params.hidden_row_stride, 2) &&
         cuda::fits_vectors(params.weight, params.weight_row_stride, sizeof(float)) && cuda::router::runs_on_hopper();
}

int64_t router_logits_cuda_workspace_bytes(const RouterLogitsParams& params) {
  if (params.is_empty()) {
    return 0;
  }
  return cuda::router::Regions(params).num_bytes();
}

void router_logits_cuda(const RouterLogitsParams& params, cudaStream_t stream) {
  namespace router = cuda::router;
  params.validate();
  ZEXPERT_CHECK(params.data_type != ScalarType::kFloat64,
                "hidden_states must be float32, bfloat16 or float16 on CUDA, got float64");
  if (params.is_empty()) {
    return;
  }
  const router::Regions regions(params);
  ZEXPERT_CHECK(params.workspace != nullptr || regions.num_bytes() == 0, "workspace must not be null");
  auto* const partial_sums = static_cast<float*>(params.workspace);
  if (router_logits_uses_wgmma(params)) {
    ZEXPERT_CHECK(params.num_tokens <= INT32_MAX - router::kPair * router::kManyTokens &&
                      params.num_experts <= INT32_MAX - router::kManyExperts && params.hidden_size <= INT32_MAX,
                  "the numbers of tokens and experts and hidden_size must be below 2^31, got ", params.num_tokens, ", ",
                  params.num_experts, " and ", params.hidden_size);
    router::HopperWorkspace workspace;
    auto* const bytes = static_cast<char*>(params.workspace);
    workspace.partial_sums = partial_sums;
    workspace.parts = bytes + regions.partial_sums;
    workspace.inverse_scales = reinterpret_cast<float*>(bytes + regions.partial_sums + regions.parts);
    workspace.has_scales =
        reinterpret_cast<int*>(bytes + regions.partial_sums + regions.parts + regions.inverse_scales);
    const router::Mode mode =
        router::choose_mode(params.num_tokens, params.num_experts, params.hidden_size, cuda::num_multiprocessors());
    router::multiply_on_hopper(params, mode, workspace, stream);
  } else {
    router::Float32Arguments arguments = router::float32_arguments(params);
    arguments.out = regions.partial_sums > 0 ? partial_sums : static_cast<float*>(params.logits);
    const int64_t num_blocks = int64_t{arguments.num_expert_tiles} * arguments.num_token_tiles *
                               (router::kGroups / arguments.groups_per_block);
    ZEXPERT_CHECK(num_blocks <= INT32_MAX, "the tiles of 64 tokens by 64 experts must be fewer than 2^31, got ",
                  num_blocks);
    cuda::visit_data_type(params.data_type, [&](auto element) {
      using T = decltype(element);
      cuda::launch("router_logits", &router::multiply_in_float32<T>, num_blocks, router::kTileThreads, 0, stream,
                   arguments);
    });
  }
  if (regions.partial_sums > 0) {
    router::add_all_groups(params, partial_sums, stream);
  }
}

}  // namespace zexpert
