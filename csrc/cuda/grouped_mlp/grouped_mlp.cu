// SPDX-License-Identifier: Apache-2.0
// grouped_mlp on a Hopper GPU: a kernel that plans the tiles, and one for each of the two products.
#include "zexpert/grouped_mlp.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/grouped_mlp/product_kernel.cuh"
#include "cuda/grouped_mlp/product_launch.h"
#include "cuda/hopper_host.h"
#include "cuda/launch.cuh"
#include "zexpert/error.h"
#include "zexpert/grouped_mlp_choice.h"
#include "zexpert/moe_permute.h"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kMaxExperts = static_cast<int>(kHopperMaxExperts);

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

/// row_tile_starts[e] = row tiles of the experts before e; a thread per expert. Also clears `counters`, and copies the
/// offsets, clamped to the rows that exist.
__global__ void __launch_bounds__(kMaxExperts) plan_tiles(const TilePlanArguments arguments) {
  __shared__ int warp_sums[kMaxExperts / kWarpSize];
  wait_for_previous_kernels();
  let_next_kernel_start();
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

CUtensorMap encode(const TensorMapShape& shape, ScalarType data_type, const void* data) {
  static_assert(sizeof(cuuint64_t) == sizeof(uint64_t) && sizeof(cuuint32_t) == sizeof(uint32_t));
  constexpr cuuint32_t kElementStrides[kMaxTensorRank] = {1, 1, 1, 1, 1};
  cuuint64_t sizes[kMaxTensorRank] = {};
  cuuint64_t strides[kMaxTensorRank] = {};
  for (uint32_t dim = 0; dim < shape.rank; ++dim) {
    sizes[dim] = shape.sizes[dim];
    strides[dim] = shape.strides[dim];
  }
  CUtensorMap map{};
  const CUresult status = encode_tiled()(
      &map, data_type == ScalarType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
      shape.rank, const_cast<void*>(data), sizes, strides + 1, shape.box, kElementStrides,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  ZEXPERT_CHECK(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled failed with CUresult ", static_cast<int>(status),
                " for a tensor of rank ", shape.rank);
  return map;
}

/// Parts of the workspace, each aligned to 256 bytes.
struct Workspace {
  int64_t rows;  // of tokens, gathered
  int64_t activation;
  int64_t partial_sums;
  int64_t counters;  // of the gate and up product, then of the down product: arrivals, and tickets
  int64_t expert_offsets;
  int64_t row_tile_starts;
  int64_t num_bytes;
};

/// Of one product: the blocks' arrivals, and the tickets.
int64_t num_counters(int64_t num_blocks) { return num_blocks + 1; }

int64_t tile_rows_of(const GroupedMlpParams& params) {
  return params.tile_rows != 0 ? params.tile_rows : hopper_tile_rows(params.num_rows, params.num_experts);
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
  parts.rows = add(params.row_slots != nullptr ? params.num_rows * params.hidden_size * kElementBytes : 0);
  parts.activation = add(params.num_rows * params.intermediate_size * kElementBytes);
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
  ZEXPERT_CHECK(params.tile_rows >= 0 && params.tile_rows <= kHopperMaxTileRows && params.tile_rows % kRowStep == 0,
                "tile_rows must be a multiple of ", kRowStep, " from 0 to ", kHopperMaxTileRows, ", got ",
                params.tile_rows);
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

/// Both products, one after the other.
class Products {
 public:
  Products(const GroupedMlpParams& params, int num_blocks, const Workspace& parts, char* workspace, cudaStream_t stream)
      : params_(params),
        tile_rows_(tile_rows_of(params)),
        num_blocks_(num_blocks),
        activation_(workspace + parts.activation),
        partial_sums_(reinterpret_cast<float*>(workspace + parts.partial_sums)),
        counters_(reinterpret_cast<int32_t*>(workspace + parts.counters)),
        expert_offsets_(reinterpret_cast<int32_t*>(workspace + parts.expert_offsets)),
        row_tile_starts_(reinterpret_cast<int32_t*>(workspace + parts.row_tile_starts)),
        stream_(stream) {}

  void plan() const {
    TilePlanArguments plan{};
    plan.given_offsets = params_.expert_offsets;
    plan.expert_offsets = expert_offsets_;
    plan.row_tile_starts = row_tile_starts_;
    plan.counters = counters_;
    plan.num_counters = static_cast<int>(2 * num_counters(num_blocks_));
    plan.num_experts = static_cast<int>(params_.num_experts);
    plan.num_rows = static_cast<int>(params_.num_rows);
    plan.max_rows_per_tile = static_cast<int>(tile_rows_);
    launch("grouped_mlp", &plan_tiles, 1, kMaxExperts, 0, stream_, plan);
  }

  void multiply() const {
    multiply(Product::kGateUp, params_.w13_weight, params_.w13_expert_stride, params_.rows, params_.rows_row_stride,
             params_.hidden_size, activation_, params_.intermediate_size, params_.intermediate_size);
    multiply(Product::kDown, params_.w2_weight, params_.w2_expert_stride, activation_, params_.intermediate_size,
             params_.intermediate_size, params_.out, params_.out_row_stride, params_.hidden_size);
  }

 private:
  void multiply(Product product, const void* weights, int64_t expert_stride, const void* rows, int64_t row_stride,
                int64_t depth, void* out, int64_t out_row_stride, int64_t num_channels) const {
    const Tiles tiles = tile_rows_ <= kHopperTallTileRows ? Tiles::kTall : Tiles::kWide;
    ProductArguments arguments{};
    arguments.weights = encode(weights_map(product, tiles, num_channels, depth, params_.num_experts, expert_stride),
                               params_.data_type, weights);
    for (int box = 0; box < kRowBoxes; ++box) {
      arguments.rows[box] = encode(rows_map(params_.num_rows, depth, row_stride, box), params_.data_type, rows);
    }
    arguments.expert_offsets = expert_offsets_;
    arguments.row_tile_starts = row_tile_starts_;
    arguments.out = out;
    arguments.partial_sums = partial_sums_;
    arguments.arrivals = counters_ + (product == Product::kGateUp ? 0 : num_counters(num_blocks_));
    arguments.tickets = arguments.arrivals + num_blocks_;
    arguments.out_row_stride = out_row_stride;
    arguments.num_experts = static_cast<int>(params_.num_experts);
    arguments.num_channels = static_cast<int>(num_channels);
    arguments.num_steps = static_cast<int>(depth / kStepDepth);
    arguments.max_rows_per_tile = static_cast<int>(tile_rows_);
    if (params_.data_type == ScalarType::kFloat16) {
      launch_grouped_product<__half>(product, arguments, num_blocks_, stream_);
    } else {
      launch_grouped_product<__nv_bfloat16>(product, arguments, num_blocks_, stream_);
    }
  }

  const GroupedMlpParams& params_;
  int64_t tile_rows_;
  int num_blocks_;
  void* activation_;
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
  const GroupedMlpParams of_rows =
      params.row_slots != nullptr ? cuda::gather_rows(params, workspace + parts.rows, stream) : params;
  const cuda::Products products(of_rows, num_blocks, parts, workspace, stream);
  products.plan();
  products.multiply();
}

}  // namespace zexpert
