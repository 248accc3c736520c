// SPDX-License-Identifier: Apache-2.0
#include "cuda/router_logits_hopper.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/hopper_host.h"
#include "cuda/launch.cuh"
#include "cuda/router_logits_hopper.cuh"
#include "zexpert/error.h"

namespace zexpert::cuda::router {
namespace {

/// The map of a matrix whose boxes are lines of kLineBytes.
CUtensorMap encode(CUtensorMapDataType type, int64_t element_bytes, const void* data, int64_t num_rows,
                   int64_t row_size, int64_t row_stride, int box_rows) {
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(row_size), static_cast<cuuint64_t>(num_rows)};
  // A single row may have any stride, but the driver wants one that rows do not overlap in.
  const int64_t stride = num_rows == 1 ? divide_up(row_size * element_bytes, 16) * 16 : row_stride * element_bytes;
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(kLineBytes / element_bytes), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t element_strides[2] = {1, 1};
  CUtensorMap map{};
  const CUresult status = encode_tiled()(&map, type, 2, const_cast<void*>(data), sizes, strides, box, element_strides,
                                         CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  ZEXPERT_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with CUresult ", static_cast<int>(status),
                " for a matrix of ", num_rows, " by ", row_size, " elements");
  return map;
}

/// scales[n] brings expert n's largest weight into [2^14, 2^15), which float16 holds with all its bits. A block per
/// expert.
__global__ void __launch_bounds__(256)
    find_scales(const float* weight, int64_t row_stride, int64_t row_size, float* scales) {
  __shared__ float largest_of_warps[256 / kWarpSize];
  wait_for_previous_kernels();
  let_next_kernel_start();
  const float* row = weight + blockIdx.x * row_stride;
  float largest = 0;
  for (int64_t i = threadIdx.x; i < row_size; i += blockDim.x) largest = fmaxf(largest, fabsf(row[i]));
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, offset));
  if (threadIdx.x % kWarpSize == 0)
    largest_of_warps[threadIdx.x / kWarpSize] = largest;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (const float other : largest_of_warps) largest = fmaxf(largest, other);
    constexpr int kBias = 127;
    const int exponent = static_cast<int>(__float_as_uint(largest) >> 23U) - kBias;
    const int scale = min(max(14 - exponent, -126), 126);  // scale and inverse are normal numbers
    scales[blockIdx.x] = largest == 0 ? 1.0F : __uint_as_float(static_cast<uint32_t>(kBias + scale) << 23U);
  }
}

template <typename Memory>
constexpr size_t memory_bytes() {
  constexpr size_t kBytes = sizeof(Memory) + kSwizzleBytes;  // to align it
  constexpr size_t kMostBytes = 227 * 1024;
  static_assert(kBytes <= kMostBytes);
  return kBytes;
}

template <typename T, int kParts, int kColumns, int kStages>
bool launch_few(const HopperArguments& arguments, cudaStream_t stream) {
  const int64_t num_blocks = divide_up(arguments.num_experts, kFewExperts) * kGroups;
  return launch_clusters("router_logits", &few_tokens<T, kParts, kColumns, kStages>, num_blocks, kGroups, kFewThreads,
                         memory_bytes<FewMemory<kColumns, kStages>>(), stream, arguments);
}

/// Of few tokens' kernels: as many stages as fit.
template <typename T, int kParts>
bool launch_few(int width, const HopperArguments& arguments, cudaStream_t stream) {
  switch (width) {
    case 8: return launch_few<T, kParts, 8, 12>(arguments, stream);
    case 16: return launch_few<T, kParts, 16, 12>(arguments, stream);
    case 32: return launch_few<T, kParts, 32, 10>(arguments, stream);
    case 64: return launch_few<T, kParts, 64, 8>(arguments, stream);
    default: return launch_few<T, kParts, 128, 5>(arguments, stream);
  }
}

template <typename T, int kParts>
bool launch_many(const HopperArguments& arguments, cudaStream_t stream) {
  constexpr int kStages = 4;
  const int64_t most_pairs = std::max(num_multiprocessors() / kPair, 1);
  const int64_t num_pairs = std::min<int64_t>(arguments.units.count(), most_pairs);
  return launch_clusters("router_logits", &many_tokens<T, kParts, kStages>, num_pairs * kPair, kPair, kManyThreads,
                         memory_bytes<StageMemory<kManyExperts, kManyTokens, kStages>>(), stream, arguments);
}

template <typename T, int kParts>
void multiply(const RouterLogitsParams& params, Mode mode, HopperArguments& arguments, cudaStream_t stream) {
  constexpr bool kIsHalf = std::is_same_v<T, __half>;
  const auto encode_both = [&](int tile_experts, int tile_tokens) {
    arguments.weight = encode(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, sizeof(float), params.weight, params.num_experts,
                              params.hidden_size, params.weight_row_stride, tile_experts);
    arguments.hidden_states =
        encode(kIsHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, sizeof(T),
               params.hidden_states, params.num_tokens, params.hidden_size, params.hidden_row_stride, tile_tokens);
  };
  bool has_started = false;
  if (mode == Mode::kFew) {
    const int width = few_tokens_width(params.num_tokens);
    encode_both(kFewExperts, width);
    has_started = launch_few<T, kParts>(width, arguments, stream);
  } else {
    arguments.units = units_of(mode, params.num_tokens, params.num_experts);
    encode_both(kManyExperts, kManyTokens);
    has_started = launch_many<T, kParts>(arguments, stream);
  }
  ZEXPERT_CHECK(has_started, "router_logits must run on a GPU with room for a cluster of ",
                mode == Mode::kFew ? kGroups : kPair, " blocks");
}

}  // namespace

bool runs_on_hopper() {
  return is_compiled_for_hopper() && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

void multiply_on_hopper(const RouterLogitsParams& params, Mode mode, const HopperWorkspace& workspace,
                        cudaStream_t stream) {
  HopperArguments arguments{};
  arguments.scales = workspace.scales;
  arguments.out = mode == Mode::kSome ? workspace.partial_sums : static_cast<float*>(params.logits);
  arguments.num_tokens = params.num_tokens;
  arguments.num_experts = static_cast<int>(params.num_experts);
  arguments.num_steps = static_cast<int>(divide_up(params.hidden_size, kStepDepth));
  if (params.data_type == ScalarType::kFloat16) {
    launch("router_logits", &find_scales, params.num_experts, 256, 0, stream, static_cast<const float*>(params.weight),
           params.weight_row_stride, params.hidden_size, workspace.scales);
    multiply<__half, 2>(params, mode, arguments, stream);
  } else {
    multiply<__nv_bfloat16, kWeightParts>(params, mode, arguments, stream);
  }
}

}  // namespace zexpert::cuda::router
