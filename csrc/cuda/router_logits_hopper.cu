// SPDX-License-Identifier: Apache-2.0
#include "cuda/router_logits_hopper.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/hopper_host.h"
#include "cuda/launch.cuh"
#include "cuda/router_logits_few.cuh"
#include "cuda/router_logits_many.cuh"
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

template <typename Memory>
constexpr size_t memory_bytes() {
  constexpr size_t kBytes = sizeof(Memory) + kSwizzleBytes;  // to align it
  constexpr size_t kMostBytes = 227 * 1024;
  static_assert(kBytes <= kMostBytes);
  return kBytes;
}

template <typename T>
constexpr CUtensorMapDataType kMapType =
    std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

template <typename T>
CUtensorMap encode_tokens(const RouterLogitsParams& params, int tile_tokens) {
  return encode(kMapType<T>, sizeof(T), params.hidden_states, params.num_tokens, params.hidden_size,
                params.hidden_row_stride, tile_tokens);
}

void check_start(bool has_started, int cluster_size) {
  ZEXPERT_CHECK(has_started, "router_logits must run on a GPU with room for a cluster of ", cluster_size, " blocks");
}

template <typename T, int kColumns, int kStages>
bool launch_few(const FewArguments& arguments, cudaStream_t stream) {
  const int64_t num_blocks = divide_up(arguments.num_experts, kFewExperts) * kGroups;
  return launch_clusters("router_logits", &few_tokens<T, kColumns, kStages>, num_blocks, kGroups, few_threads(kColumns),
                         memory_bytes<FewMemory<kColumns, kStages>>(), stream, arguments);
}

/// As many stages as fit.
template <typename T>
bool launch_few(int width, const FewArguments& arguments, cudaStream_t stream) {
  switch (width) {
    case 8: return launch_few<T, 8, 12>(arguments, stream);
    case 16: return launch_few<T, 16, 12>(arguments, stream);
    case 32: return launch_few<T, 32, 10>(arguments, stream);
    case 64: return launch_few<T, 64, 7>(arguments, stream);
    default: return launch_few<T, 128, 5>(arguments, stream);
  }
}

template <typename T>
void multiply_few(const RouterLogitsParams& params, cudaStream_t stream) {
  const int width = few_tokens_width(params.num_tokens);
  FewArguments arguments{};
  arguments.weight = encode(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, sizeof(float), params.weight, params.num_experts,
                            params.hidden_size, params.weight_row_stride, kFewExperts);
  arguments.hidden_states = encode_tokens<T>(params, width);
  arguments.logits = static_cast<float*>(params.logits);
  arguments.num_tokens = params.num_tokens;
  arguments.num_experts = static_cast<int>(params.num_experts);
  arguments.num_steps = static_cast<int>(divide_up(params.hidden_size, kStepDepth));
  check_start(launch_few<T>(width, arguments, stream), kGroups);
}

template <typename T>
void multiply_many(const RouterLogitsParams& params, Mode mode, const HopperWorkspace& workspace, cudaStream_t stream) {
  SplitArguments split{};
  split.weight = static_cast<const float*>(params.weight);
  split.row_stride = params.weight_row_stride;
  split.num_experts = static_cast<int>(params.num_experts);
  split.hidden_size = static_cast<int>(params.hidden_size);
  split.num_steps = static_cast<int>(divide_up(params.hidden_size, kStepDepth));
  split.parts = static_cast<__half*>(workspace.parts);
  split.inverse_scales = workspace.inverse_scales;
  split.has_scales = workspace.has_scales;
  launch("router_logits", &split_weights, divide_up(params.num_experts, kManyExperts) * split.num_steps, kSplitThreads,
         0, stream, split);

  ManyArguments arguments{};
  arguments.parts = encode(CU_TENSOR_MAP_DATA_TYPE_FLOAT16, sizeof(__half), workspace.parts,
                           kParts * params.num_experts, params.hidden_size, params.hidden_size, kManyExperts);
  arguments.hidden_states = encode_tokens<T>(params, kManyTokens);
  arguments.inverse_scales = workspace.inverse_scales;
  arguments.has_scales = workspace.has_scales;
  arguments.out = mode == Mode::kSome ? workspace.partial_sums : static_cast<float*>(params.logits);
  arguments.num_tokens = params.num_tokens;
  arguments.num_experts = split.num_experts;
  arguments.num_steps = split.num_steps;
  arguments.units = units_of(mode, params.num_tokens, params.num_experts);
  constexpr int kStages = 4;
  const int64_t most_pairs = std::max(num_multiprocessors() / kPair, 1);
  const int64_t num_pairs = std::min<int64_t>(arguments.units.count(), most_pairs);
  check_start(launch_clusters("router_logits", &many_tokens<T, kStages>, num_pairs * kPair, kPair, kManyThreads,
                              memory_bytes<ManyMemory<kStages>>(), stream, arguments),
              kPair);
}

template <typename T>
void multiply(const RouterLogitsParams& params, Mode mode, const HopperWorkspace& workspace, cudaStream_t stream) {
  if (mode == Mode::kFew)
    multiply_few<T>(params, stream);
  else
    multiply_many<T>(params, mode, workspace, stream);
}

}  // namespace

bool runs_on_hopper() {
  return is_compiled_for_hopper() && device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

void multiply_on_hopper(const RouterLogitsParams& params, Mode mode, const HopperWorkspace& workspace,
                        cudaStream_t stream) {
  if (params.data_type == ScalarType::kFloat16)
    multiply<__half>(params, mode, workspace, stream);
  else
    multiply<__nv_bfloat16>(params, mode, workspace, stream);
}

}  // namespace zexpert::cuda::router
