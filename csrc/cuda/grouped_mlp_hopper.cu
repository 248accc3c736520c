// SPDX-License-Identifier: Apache-2.0
// grouped_mlp_hopper: a kernel that plans the tiles, and one for each of the two products.
#include "cuda/grouped_mlp_hopper.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cuda/grouped_mlp_hopper_kernel.cuh"
#include "cuda/launch.cuh"
#include "zexpert/error.h"
#include "zexpert/grouped_mlp.h"

extern "C" const char* zexpert_cuda_architectures();  // build_info.cu

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
/// offsets into the range that there are rows for, whatever was given.
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

using EncodeTiled = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                                 const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                                 CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

/// The driver's cuTensorMapEncodeTiled, asked for at run time: the library loads on machines without a driver.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    constexpr unsigned kCuda12 = 12000;
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kCuda12, cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion");
    ZEXPERT_CHECK(result == cudaDriverEntryPointSuccess && found != nullptr,
                  "the CUDA driver must have cuTensorMapEncodeTiled, which came with CUDA 12.0; query result ",
                  static_cast<int>(result));
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
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
  int64_t activation;
  int64_t partial_sums;
  int64_t counters;  // of the gate and up product, then of the down product: arrivals, and tickets
  int64_t expert_offsets;
  int64_t row_tile_starts;
  int64_t num_bytes;
};

/// Of one product: the blocks' arrivals, and the tickets.
int64_t num_counters(int64_t num_blocks) { return num_blocks + 1; }

Workspace workspace_parts(const GroupedMlpParams& mlp, int64_t tile_rows, int64_t num_blocks) {
  constexpr int64_t kAlignment = 256;
  int64_t end = 0;
  const auto add = [&](int64_t num_bytes) {
    const int64_t begin = end;
    end += (num_bytes + kAlignment - 1) / kAlignment * kAlignment;
    return begin;
  };
  Workspace parts{};
  parts.activation = add(mlp.num_rows * mlp.intermediate_size * kElementBytes);
  // Room for the largest tiles of the kernel that takes these.
  const int64_t most_columns = tile_rows <= kHopperFewTileRows ? kHopperFewTileRows : kHopperTallTileRows;
  parts.partial_sums = add(kPartsOfBlock * num_blocks * most_columns * kConsumers * int64_t{sizeof(float)});
  parts.counters = add(2 * num_counters(num_blocks) * int64_t{sizeof(int32_t)});
  parts.expert_offsets = add((mlp.num_experts + 1) * int64_t{sizeof(int32_t)});
  parts.row_tile_starts = add((mlp.num_experts + 1) * int64_t{sizeof(int32_t)});
  parts.num_bytes = end;
  return parts;
}

int64_t tile_rows_of(const GroupedMlpHopperParams& params) {
  return params.tile_rows != 0 ? params.tile_rows : hopper_tile_rows(params.mlp.num_rows, params.mlp.num_experts);
}

/// The products' code is in sm_90a alone, which CMake calls 90a and TORCH_CUDA_ARCH_LIST 9.0a.
bool is_compiled() {
  const char* const architectures = zexpert_cuda_architectures();
  return std::strstr(architectures, "90a") != nullptr || std::strstr(architectures, "9.0a") != nullptr;
}

bool is_on_hopper() {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

void check_params(const GroupedMlpHopperParams& params) {
  const GroupedMlpParams& mlp = params.mlp;
  ZEXPERT_CHECK(is_on_hopper(), "grouped_mlp_hopper must run on a GPU of compute capability 9.0, got ",
                device_attribute(cudaDevAttrComputeCapabilityMajor), ".",
                device_attribute(cudaDevAttrComputeCapabilityMinor));
  ZEXPERT_CHECK(is_compiled(), "grouped_mlp_hopper must be compiled for the architecture 9.0a, got ",
                zexpert_cuda_architectures());
  ZEXPERT_CHECK(mlp.data_type == ScalarType::kBFloat16 || mlp.data_type == ScalarType::kFloat16,
                "rows must be bfloat16 or float16, got ", name(mlp.data_type));
  ZEXPERT_CHECK(mlp.num_experts <= kHopperMaxExperts, "the number of experts must be at most ", kHopperMaxExperts,
                ", got ", mlp.num_experts);
  ZEXPERT_CHECK(mlp.hidden_size % kHopperSizeStep == 0, "hidden_size must be a multiple of ", kHopperSizeStep, ", got ",
                mlp.hidden_size);
  ZEXPERT_CHECK(mlp.intermediate_size % kHopperSizeStep == 0, "intermediate_size must be a multiple of ",
                kHopperSizeStep, ", got ", mlp.intermediate_size);
  ZEXPERT_CHECK(mlp.num_rows <= INT32_MAX, "the number of rows must be below 2^31, got ", mlp.num_rows);
  ZEXPERT_CHECK(params.tile_rows >= 0 && params.tile_rows <= kHopperMaxTileRows && params.tile_rows % kRowStep == 0,
                "tile_rows must be a multiple of ", kRowStep, " from 0 to ", kHopperMaxTileRows, ", got ",
                params.tile_rows);
  ZEXPERT_CHECK(is_aligned(mlp.rows) && is_aligned(mlp.w13_weight) && is_aligned(mlp.w2_weight) && is_aligned(mlp.out),
                "rows, w13_weight, w2_weight and out must begin at multiples of 16 bytes");
  for (const int64_t stride : {mlp.rows_row_stride, mlp.out_row_stride, mlp.w13_expert_stride, mlp.w2_expert_stride}) {
    ZEXPERT_CHECK(stride % 8 == 0, "strides of rows, out and experts must be multiples of 8 elements, got ", stride);
  }
}

}  // namespace
}  // namespace cuda

bool runs_grouped_mlp_hopper() { return cuda::is_compiled() && cuda::is_on_hopper(); }

int64_t grouped_mlp_hopper_workspace_bytes(const GroupedMlpHopperParams& params) {
  return cuda::workspace_parts(params.mlp, cuda::tile_rows_of(params), cuda::num_multiprocessors()).num_bytes;
}

void grouped_mlp_hopper(const GroupedMlpHopperParams& params, cudaStream_t stream) {
  using cuda::Product;
  const GroupedMlpParams& mlp = params.mlp;
  cuda::check_params(params);
  if (mlp.num_rows == 0 || mlp.num_experts == 0 || mlp.hidden_size == 0) {
    return;
  }
  ZEXPERT_CHECK(mlp.intermediate_size > 0, "intermediate_size must be at least 1, got 0");

  const int num_blocks = cuda::num_multiprocessors();
  const int64_t tile_rows = cuda::tile_rows_of(params);
  const cuda::Workspace parts = cuda::workspace_parts(mlp, tile_rows, num_blocks);
  auto* const workspace = static_cast<char*>(params.workspace);
  auto* const counters = reinterpret_cast<int32_t*>(workspace + parts.counters);
  void* const activation = workspace + parts.activation;

  cuda::TilePlanArguments plan{};
  plan.given_offsets = mlp.expert_offsets;
  plan.expert_offsets = reinterpret_cast<int32_t*>(workspace + parts.expert_offsets);
  plan.row_tile_starts = reinterpret_cast<int32_t*>(workspace + parts.row_tile_starts);
  plan.counters = counters;
  plan.num_counters = static_cast<int>(2 * cuda::num_counters(num_blocks));
  plan.num_experts = static_cast<int>(mlp.num_experts);
  plan.num_rows = static_cast<int>(mlp.num_rows);
  plan.max_rows_per_tile = static_cast<int>(tile_rows);
  cuda::launch("grouped_mlp_hopper", &cuda::plan_tiles, 1, cuda::kMaxExperts, 0, stream, plan);

  const cuda::Tiles tiles = tile_rows <= kHopperTallTileRows ? cuda::Tiles::kTall : cuda::Tiles::kWide;
  const auto multiply = [&](Product product, const void* weights, int64_t expert_stride, const void* rows,
                            int64_t row_stride, int64_t depth, void* out, int64_t out_row_stride,
                            int64_t num_channels) {
    cuda::ProductArguments arguments{};
    arguments.weights = cuda::encode(
        cuda::weights_map(product, tiles, num_channels, depth, mlp.num_experts, expert_stride), mlp.data_type, weights);
    for (int box = 0; box < cuda::kRowBoxes; ++box) {
      arguments.rows[box] = cuda::encode(cuda::rows_map(mlp.num_rows, depth, row_stride, box), mlp.data_type, rows);
    }
    arguments.expert_offsets = plan.expert_offsets;
    arguments.row_tile_starts = plan.row_tile_starts;
    arguments.out = out;
    arguments.partial_sums = reinterpret_cast<float*>(workspace + parts.partial_sums);
    arguments.arrivals = counters + (product == Product::kGateUp ? 0 : cuda::num_counters(num_blocks));
    arguments.tickets = arguments.arrivals + num_blocks;
    arguments.out_row_stride = out_row_stride;
    arguments.num_experts = plan.num_experts;
    arguments.num_channels = static_cast<int>(num_channels);
    arguments.num_steps = static_cast<int>(depth / cuda::kStepDepth);
    arguments.max_rows_per_tile = plan.max_rows_per_tile;
    if (mlp.data_type == ScalarType::kFloat16) {
      cuda::launch_grouped_product<__half>(product, arguments, num_blocks, stream);
    } else {
      cuda::launch_grouped_product<__nv_bfloat16>(product, arguments, num_blocks, stream);
    }
  };
  multiply(Product::kGateUp, mlp.w13_weight, mlp.w13_expert_stride, mlp.rows, mlp.rows_row_stride, mlp.hidden_size,
           activation, mlp.intermediate_size, mlp.intermediate_size);
  multiply(Product::kDown, mlp.w2_weight, mlp.w2_expert_stride, activation, mlp.intermediate_size,
           mlp.intermediate_size, mlp.out, mlp.out_row_stride, mlp.hidden_size);
}

}  // namespace zexpert
