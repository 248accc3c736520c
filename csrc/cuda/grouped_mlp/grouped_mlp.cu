// SPDX-License-Identifier: Apache-2.0
// grouped_mlp on a Hopper GPU: a kernel that plans the tiles, and quantises the rows if weights are float8, then one
// kernel for each of the two products.
#include "zexpert/grouped_mlp.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/grouped_mlp/product_kernel.cuh"
#include "cuda/grouped_mlp/product_launch.h"
#include "cuda/hopper_host.h"
#include "cuda/launch.cuh"
#include "cuda/types.cuh"
#include "cuda/vector.cuh"
#include "zexpert/error.h"
#include "zexpert/grouped_mlp_choice.h"
#include "zexpert/moe_permute.h"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kMaxExperts = static_cast<int>(kHopperMaxExperts);
constexpr int kQuantisedBlocks = 4;  ///< blocks of scales that half a warp quantises at a time

struct TilePlanArguments {
  const int32_t* given_offsets;
  int32_t* expert_offsets;
  int32_t* row_tile_starts;
  int32_t* counters;
  int num_counters;
  int num_experts;
  int num_rows;
  int max_rows_per_tile;
};

/// row_tile_starts[e] = row tiles of the experts before e; a thread per expert, in one block. Also clears `counters`,
/// and copies the offsets, clamped to the rows that exist.
__device__ __forceinline__ void plan_tiles(const TilePlanArguments& arguments) {
  __shared__ int warp_sums[kMaxExperts / kWarpSize];
  const int expert = static_cast<int>(threadIdx.x);
  for (int i = expert; i < arguments.num_counters; i += kMaxExperts) arguments.counters[i] = 0;

  const auto offset = [&](int e) {
    return e <= arguments.num_experts ? min(max(arguments.given_offsets[e], 0), arguments.num_rows) : 0;
  };
  const int begin = offset(expert);
  const int num_rows = expert < arguments.num_experts ? offset(expert + 1) - begin : 0;
  const int num_tiles = split_segment(num_rows, arguments.max_rows_per_tile).num_tiles;
  const int start = block_exclusive_sum(num_tiles, warp_sums);
  if (expert < arguments.num_experts) {
    arguments.expert_offsets[expert] = begin;
    arguments.row_tile_starts[expert] = start;
  }
  if (expert == arguments.num_experts - 1) {
    arguments.expert_offsets[expert + 1] = begin + max(num_rows, 0);
    arguments.row_tile_starts[expert + 1] = start + num_tiles;
  }
}

__global__ void __launch_bounds__(kMaxExperts) plan_tiles_alone(const TilePlanArguments arguments) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  plan_tiles(arguments);
}

struct QuantiseRowsArguments {
  const __nv_bfloat16* rows;      ///< [num_rows, hidden_size], or with row_slots [num_tokens, hidden_size]
  const int32_t* row_slots;       ///< null, or [num_rows]: row r is token row_slots[r] / top_k
  const int32_t* expert_offsets;  ///< [num_experts + 1]; rows from the last on do no work
  uint8_t* out;                   ///< [num_rows, hidden_size]
  float* scales;                  ///< [blocks of the hidden size, scales_stride]
  int64_t row_stride;
  int64_t scales_stride;
  int num_experts;
  int num_rows;
  int num_slots;
  int top_k;
  int hidden_size;
};

/// Where the scales of a row are. Stays within scales_stride whatever the offsets.
__device__ __forceinline__ int64_t scale_of_row(const QuantiseRowsArguments& arguments, int row) {
  int low = 0;
  int high = arguments.num_experts;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    const bool before = arguments.expert_offsets[middle] <= row;
    low = before ? middle : low;
    high = before ? high : middle;
  }
  const int begin = min(max(arguments.expert_offsets[low], 0), row);
  return first_scale(begin, low) + row - begin;
}

/// float8 rows with a scale for each row and block of kScaleBlock channels. Half a warp has a few blocks at a time.
__device__ __forceinline__ void quantise_rows(const QuantiseRowsArguments& arguments, int block, int num_blocks) {
  constexpr int kLanes = kWarpSize / 2;
  constexpr int kChannels = static_cast<int>(kScaleBlock) / kLanes;
  constexpr int kAtOnce = kMaxExperts / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const auto num_scales = static_cast<int>(divide_up(arguments.hidden_size, kScaleBlock));
  const auto num_tasks_of_row = static_cast<int>(divide_up(num_scales, kQuantisedBlocks));
  const int num_rows = min(max(arguments.expert_offsets[arguments.num_experts], 0), arguments.num_rows);
  const int64_t num_tasks = int64_t{num_rows} * num_tasks_of_row;
  const unsigned half_warp = 0xffffU << (threadIdx.x % kWarpSize / kLanes * kLanes);
  for (int64_t task = int64_t{block} * kAtOnce + threadIdx.x / kLanes; task < num_tasks;
       task += int64_t{num_blocks} * kAtOnce) {
    const auto row = static_cast<int>(task / num_tasks_of_row);
    const int first = static_cast<int>(task - int64_t{row} * num_tasks_of_row) * kQuantisedBlocks;
    const int slot = arguments.row_slots != nullptr ? arguments.row_slots[row] : row;
    if (slot < 0 || slot >= arguments.num_slots)
      continue;
    const int token = arguments.row_slots != nullptr ? slot / arguments.top_k : row;

    // Load
    uint4 words[kQuantisedBlocks];
#pragma unroll
    for (int i = 0; i < kQuantisedBlocks; ++i) {
      const int channel = (first + i) * static_cast<int>(kScaleBlock) + lane * kChannels;
      words[i] = channel < arguments.hidden_size
                     ? *reinterpret_cast<const uint4*>(arguments.rows + token * arguments.row_stride + channel)
                     : uint4{};
    }
    float* const scales = arguments.scales + scale_of_row(arguments, row);

    // Scale and write
#pragma unroll
    for (int i = 0; i < kQuantisedBlocks; ++i) {
      const auto elements = to_vector<__nv_bfloat16, kChannels>(words[i]);
      float values[kChannels];
      float most = 0.0F;
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        values[c] = to_float(elements.values[c]);
        most = fmaxf(most, fabsf(values[c]));
      }
#pragma unroll
      for (int offset = 1; offset < kLanes; offset *= 2) most = fmaxf(most, __shfl_xor_sync(half_warp, most, offset));
      const float scale = float8_scale(most);
      if (lane == 0 && first + i < num_scales)
        scales[(first + i) * arguments.scales_stride] = scale;
      const float inverse = 1.0F / scale;
      const auto packed = [&](int c) {
        return packed_float8(values[c] * inverse, values[c + 1] * inverse) |
               packed_float8(values[c + 2] * inverse, values[c + 3] * inverse) << 16;
      };
      const int channel = (first + i) * static_cast<int>(kScaleBlock) + lane * kChannels;
      if (channel < arguments.hidden_size)
        *reinterpret_cast<uint2*>(arguments.out + int64_t{row} * arguments.hidden_size + channel) = {packed(0),
                                                                                                     packed(4)};
    }
  }
}

/// The first block plans the tiles, the others quantise the rows.
__global__ void __launch_bounds__(kMaxExperts)
    plan_tiles_and_quantise(const TilePlanArguments plan, const QuantiseRowsArguments rows) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (blockIdx.x == 0) {
    plan_tiles(plan);
  } else {
    quantise_rows(rows, static_cast<int>(blockIdx.x) - 1, static_cast<int>(gridDim.x) - 1);
  }
}

CUtensorMap encode(const TensorMapShape& shape, CUtensorMapDataType data_type, CUtensorMapSwizzle swizzle,
                   const void* data) {
  static_assert(sizeof(cuuint64_t) == sizeof(uint64_t) && sizeof(cuuint32_t) == sizeof(uint32_t));
  constexpr cuuint32_t kElementStrides[kMaxTensorRank] = {1, 1, 1, 1, 1};
  cuuint64_t sizes[kMaxTensorRank] = {};
  cuuint64_t strides[kMaxTensorRank] = {};
  for (uint32_t dim = 0; dim < shape.rank; ++dim) {
    sizes[dim] = shape.sizes[dim];
    strides[dim] = shape.strides[dim];
  }
  CUtensorMap map{};
  const CUresult status = encode_tiled()(&map, data_type, shape.rank, const_cast<void*>(data), sizes, strides + 1,
                                         shape.box, kElementStrides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                         CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  ZEXPERT_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with CUresult ", static_cast<int>(status),
                " for a tensor of rank ", shape.rank);
  return map;
}

/// Parts of the workspace, each aligned to 256 bytes.
struct Workspace {
  int64_t rows;        // of tokens, gathered or quantised
  int64_t row_scales;  // with float8 weights
  int64_t activation;
  int64_t activation_scales;  // with float8 weights
  int64_t partial_sums;
  int64_t counters;  // of the gate and up product, then of the down product: arrivals, and tickets
  int64_t expert_offsets;
  int64_t row_tile_starts;
  int64_t num_bytes;
};

/// Of one product: the blocks' arrivals, and the tickets.
int64_t num_counters(int64_t num_blocks) { return num_blocks + 1; }

bool has_float8_weights(const GroupedMlpParams& params) { return params.w13_scale_inv != nullptr; }

int64_t tile_rows_of(const GroupedMlpParams& params) {
  return params.tile_rows != 0 ? params.tile_rows
                               : hopper_tile_rows(params.num_rows, params.num_experts, has_float8_weights(params));
}

Workspace workspace_parts(const GroupedMlpParams& params, int64_t num_blocks) {
  constexpr int64_t kAlignment = 256;
  int64_t end = 0;
  const auto add = [&](int64_t num_bytes) {
    const int64_t begin = end;
    end += (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
    return begin;
  };
  Workspace parts{};
  const bool is_float8 = has_float8_weights(params);
  const int64_t element_bytes = is_float8 ? 1 : kElementBytes;
  const auto scale_bytes = [&](int64_t depth) {
    return is_float8 ? divide_up(depth, kScaleBlock) * padded_scale_rows(params.num_rows, params.num_experts) *
                           int64_t{sizeof(float)}
                     : 0;
  };
  const bool has_own_rows = is_float8 || params.row_slots != nullptr;
  parts.rows = add(has_own_rows ? params.num_rows * params.hidden_size * element_bytes : 0);
  parts.row_scales = add(scale_bytes(params.hidden_size));
  parts.activation = add(params.num_rows * params.intermediate_size * element_bytes);
  parts.activation_scales = add(scale_bytes(params.intermediate_size));
  // Room for the largest tiles of the kernel that serves these.
  const int64_t most_columns = tile_rows_of(params) <= kHopperFewTileRows ? kHopperFewTileRows : kHopperTallTileRows;
  parts.partial_sums = add(kPartsOfBlock * num_blocks * most_columns * kConsumers * int64_t{sizeof(float)});
  parts.counters = add(2 * num_counters(num_blocks) * int64_t{sizeof(int32_t)});
  parts.expert_offsets = add((params.num_experts + 1) * int64_t{sizeof(int32_t)});
  parts.row_tile_starts = add((params.num_experts + 1) * int64_t{sizeof(int32_t)});
  parts.num_bytes = end;
  return parts;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

void check_layout(const GroupedMlpParams& params) {
  ZEXPERT_CHECK(params.num_rows <= INT32_MAX, "the number of rows must be below 2^31, got ", params.num_rows);
  const int64_t most = has_float8_weights(params) ? kHopperFloat8TileRows : kHopperMaxTileRows;
  ZEXPERT_CHECK(params.tile_rows >= 0 && params.tile_rows <= most && params.tile_rows % kRowStep == 0,
                "tile_rows must be a multiple of ", kRowStep, " from 0 to ", most, ", got ", params.tile_rows);
  ZEXPERT_CHECK(is_aligned(params.rows) && is_aligned(params.w13_weight) && is_aligned(params.w2_weight) &&
                    is_aligned(params.out),
                "rows, w13_weight, w2_weight and out must begin at multiples of 16 bytes");
  for (const int64_t stride :
       {params.rows_row_stride, params.out_row_stride, params.w13_expert_stride, params.w2_expert_stride}) {
    ZEXPERT_CHECK(stride % 8 == 0, "strides of rows, out and experts must be multiples of 8 elements, got ", stride);
  }
}

void check_can_serve(const GroupedMlpParams& params) {
  const GroupedMlpCall call{grouped_mlp_cuda_device(), GroupedMlpTask::kForward, params.data_type,
                            params.num_experts,        params.hidden_size,       params.intermediate_size};
  can_serve(GroupedMlpImplementation::kHopper, call,
            [](const auto&... parts) { zexpert::detail::throw_error(parts...); });
}

/// Tokens into the rows of the workspace; returns the params of those rows.
GroupedMlpParams gather_rows(const GroupedMlpParams& params, void* rows, cudaStream_t stream) {
  MoePermuteParams permute;
  permute.hidden_states = params.rows;
  permute.row_slots = params.row_slots;
  permute.rows = rows;
  permute.data_type = params.data_type;
  permute.num_rows = params.num_rows;
  permute.num_tokens = params.num_tokens;
  permute.top_k = params.top_k;
  permute.hidden_size = params.hidden_size;
  permute.hidden_row_stride = params.rows_row_stride;
  permute.last_offset = params.expert_offsets + params.num_experts;
  moe_permute_cuda(permute, stream);
  GroupedMlpParams gathered = params;
  gathered.rows = rows;
  gathered.rows_row_stride = params.hidden_size;
  gathered.row_slots = nullptr;
  return gathered;
}

/// One of the two products: out[r] = rows[r] @ weights[expert of r].T, activated in the gate and up product.
struct ProductOperands {
  Product product;
  const void* weights;
  int64_t expert_stride;
  const float* weight_scales;  ///< of float8 weights
  int64_t expert_scale_stride;
  const void* rows;
  const void* row_scales;  ///< with float8 weights
  int64_t row_stride;
  int64_t depth;
  void* out;
  float* out_scales;  ///< of a float8 activation
  int64_t out_row_stride;
  int64_t num_channels;
};

/// The kernels of a call, one after the other.
class Products {
 public:
  Products(const GroupedMlpParams& params, int num_blocks, const Workspace& parts, char* workspace, cudaStream_t stream)
      : params_(params),
        tile_rows_(tile_rows_of(params)),
        num_blocks_(num_blocks),
        rows_(workspace + parts.rows),
        row_scales_(reinterpret_cast<float*>(workspace + parts.row_scales)),
        activation_(workspace + parts.activation),
        activation_scales_(reinterpret_cast<float*>(workspace + parts.activation_scales)),
        partial_sums_(reinterpret_cast<float*>(workspace + parts.partial_sums)),
        counters_(reinterpret_cast<int32_t*>(workspace + parts.counters)),
        expert_offsets_(reinterpret_cast<int32_t*>(workspace + parts.expert_offsets)),
        row_tile_starts_(reinterpret_cast<int32_t*>(workspace + parts.row_tile_starts)),
        stream_(stream) {}

  /// Plans the tiles, and quantises the rows where weights are float8.
  void prepare() const {
    TilePlanArguments plan{};
    plan.given_offsets = params_.expert_offsets;
    plan.expert_offsets = expert_offsets_;
    plan.row_tile_starts = row_tile_starts_;
    plan.counters = counters_;
    plan.num_counters = static_cast<int>(2 * num_counters(num_blocks_));
    plan.num_experts = static_cast<int>(params_.num_experts);
    plan.num_rows = static_cast<int>(params_.num_rows);
    plan.max_rows_per_tile = static_cast<int>(tile_rows_);
    if (!has_float8_weights(params_)) {
      launch("grouped_mlp", &plan_tiles_alone, 1, kMaxExperts, 0, stream_, plan);
      return;
    }
    QuantiseRowsArguments rows{};
    rows.rows = static_cast<const __nv_bfloat16*>(params_.rows);
    rows.row_slots = params_.row_slots;
    rows.expert_offsets = params_.expert_offsets;
    rows.num_experts = static_cast<int>(params_.num_experts);
    rows.out = static_cast<uint8_t*>(rows_);
    rows.scales = row_scales_;
    rows.row_stride = params_.rows_row_stride;
    rows.scales_stride = padded_scale_rows(params_.num_rows, params_.num_experts);
    rows.num_rows = static_cast<int>(params_.num_rows);
    rows.num_slots =
        static_cast<int>(params_.row_slots != nullptr ? params_.num_tokens * params_.top_k : params_.num_rows);
    rows.top_k = static_cast<int>(params_.top_k);
    rows.hidden_size = static_cast<int>(params_.hidden_size);
    constexpr int64_t kBlocksPerMultiprocessor = 2;
    const int64_t channels_per_block = kMaxExperts * kQuantisedBlocks * kScaleBlock / (kWarpSize / 2);
    const int64_t quantising = std::min<int64_t>(divide_up(params_.num_rows * params_.hidden_size, channels_per_block),
                                                 kBlocksPerMultiprocessor * num_blocks_ - 1);
    launch("grouped_mlp", &plan_tiles_and_quantise, 1 + quantising, kMaxExperts, 0, stream_, plan, rows);
  }

  void multiply() const {
    const bool is_float8 = has_float8_weights(params_);
    multiply({Product::kGateUp, params_.w13_weight, params_.w13_expert_stride, params_.w13_scale_inv,
              params_.w13_scale_expert_stride, is_float8 ? rows_ : params_.rows, row_scales_,
              is_float8 ? params_.hidden_size : params_.rows_row_stride, params_.hidden_size, activation_,
              activation_scales_, params_.intermediate_size, params_.intermediate_size});
    multiply({Product::kDown, params_.w2_weight, params_.w2_expert_stride, params_.w2_scale_inv,
              params_.w2_scale_expert_stride, activation_, activation_scales_, params_.intermediate_size,
              params_.intermediate_size, params_.out, nullptr, params_.out_row_stride, params_.hidden_size});
  }

 private:
  void multiply(const ProductOperands& operands) const {
    const bool is_float8 = has_float8_weights(params_);
    const int element_bytes = is_float8 ? 1 : kElementBytes;
    const CUtensorMapDataType data_type = is_float8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                          : params_.data_type == ScalarType::kFloat16
                                              ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                              : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const Tiles tiles = tile_rows_ <= kHopperTallTileRows ? Tiles::kTall : Tiles::kWide;
    const int64_t depth = operands.depth;
    ProductArguments arguments{};
    arguments.weights = encode(weights_map(operands.product, tiles, operands.num_channels, depth, params_.num_experts,
                                           operands.expert_stride, element_bytes),
                               data_type, CU_TENSOR_MAP_SWIZZLE_128B, operands.weights);
    for (int box = 0; box < kRowBoxes; ++box) {
      arguments.rows[box] = encode(rows_map(params_.num_rows, depth, operands.row_stride, box, element_bytes),
                                   data_type, CU_TENSOR_MAP_SWIZZLE_128B, operands.rows);
    }
    arguments.num_steps = static_cast<int>(divide_up(depth, step_depth(element_bytes)));
    if (is_float8) {
      const int64_t most_rows = tile_rows_ <= kHopperFewTileRows ? kHopperFewTileRows : kHopperFloat8TileRows;
      arguments.row_scales = encode(row_scales_map(padded_scale_rows(params_.num_rows, params_.num_experts),
                                                   arguments.num_steps, static_cast<int>(most_rows)),
                                    CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_SWIZZLE_NONE, operands.row_scales);
      arguments.weight_scales = operands.weight_scales;
      arguments.expert_scale_stride = operands.expert_scale_stride;
      arguments.out_scales = operands.out_scales;
      arguments.out_scales_stride = padded_scale_rows(params_.num_rows, params_.num_experts);
    }
    arguments.expert_offsets = expert_offsets_;
    arguments.row_tile_starts = row_tile_starts_;
    arguments.out = operands.out;
    arguments.partial_sums = partial_sums_;
    arguments.arrivals = counters_ + (operands.product == Product::kGateUp ? 0 : num_counters(num_blocks_));
    arguments.tickets = arguments.arrivals + num_blocks_;
    arguments.out_row_stride = operands.out_row_stride;
    arguments.num_experts = static_cast<int>(params_.num_experts);
    arguments.num_channels = static_cast<int>(operands.num_channels);
    arguments.max_rows_per_tile = static_cast<int>(tile_rows_);
    if (is_float8) {
      launch_grouped_product<__nv_fp8_e4m3>(operands.product, arguments, num_blocks_, stream_);
    } else if (params_.data_type == ScalarType::kFloat16) {
      launch_grouped_product<__half>(operands.product, arguments, num_blocks_, stream_);
    } else {
      launch_grouped_product<__nv_bfloat16>(operands.product, arguments, num_blocks_, stream_);
    }
  }

  const GroupedMlpParams& params_;
  int64_t tile_rows_;
  int num_blocks_;
  void* rows_;
  float* row_scales_;
  void* activation_;
  float* activation_scales_;
  float* partial_sums_;
  int32_t* counters_;
  int32_t* expert_offsets_;
  int32_t* row_tile_starts_;
  cudaStream_t stream_;
};

}  // namespace
}  // namespace cuda

GroupedMlpDevice grouped_mlp_cuda_device() {
  GroupedMlpDevice device;
  device.is_cuda = true;
  device.compute_capability = 10 * cuda::device_attribute(cudaDevAttrComputeCapabilityMajor) +
                              cuda::device_attribute(cudaDevAttrComputeCapabilityMinor);
  device.has_hopper_code = cuda::is_compiled_for_hopper();
  return device;
}

int64_t grouped_mlp_cuda_workspace_bytes(const GroupedMlpParams& params) {
  return cuda::workspace_parts(params, cuda::num_multiprocessors()).num_bytes;
}

void grouped_mlp_cuda(const GroupedMlpParams& params, cudaStream_t stream) {
  params.validate();
  cuda::check_layout(params);
  cuda::check_can_serve(params);
  if (params.is_empty()) {
    return;
  }
  ZEXPERT_CHECK(params.intermediate_size > 0, "intermediate_size must be at least 1, got 0");
  detail::check_pointers({{"workspace", params.workspace}});

  const int num_blocks = cuda::num_multiprocessors();
  const cuda::Workspace parts = cuda::workspace_parts(params, num_blocks);
  auto* const workspace = static_cast<char*>(params.workspace);
  const bool gathers = params.row_slots != nullptr && !cuda::has_float8_weights(params);
  const GroupedMlpParams of_rows = gathers ? cuda::gather_rows(params, workspace + parts.rows, stream) : params;
  const cuda::Products products(of_rows, num_blocks, parts, workspace, stream);
  products.prepare();
  products.multiply();
}

}  // namespace zexpert
