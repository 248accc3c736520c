// SPDX-License-Identifier: Apache-2.0
// Stable counting sort of slots by expert. Every block has a run of consecutive slots, every warp a run within it, and
// a warp places 32 slots at a time. A slot's row is the number of slots before it in the order, counted at each of
// these levels. The plan is the same in every run: all numbers are integers, and no two threads compete for a row.
#include "zexpert/moe_plan.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/launch.cuh"
#include "zexpert/error.h"
#include "zexpert/routing_spec.h"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kMaxWarps = 32;
/// Every warp clears and sums up counts of its own: for few slots, half of the warps are faster.
constexpr int64_t kMostSlotsOfHalfTheWarps = 4096;
constexpr size_t kMaxSharedMemory = 160 * 1024;

struct PlanArguments {
  const void* topk_ids;
  int32_t* expert_offsets;
  int32_t* row_slots;
  int32_t* slot_rows;
  int32_t* block_counts;  // [num_blocks, num_experts]
  int64_t num_slots;
  int64_t slots_per_block;
  int64_t slots_per_warp;
  int num_counting_warps;  // per block; the other warps have no slots
  int num_experts;
};

struct SlotRange {
  int64_t begin;
  int64_t end;
};

/// The part of [begin, begin + length) that exists.
__device__ __forceinline__ SlotRange slot_range(int64_t begin, int64_t length, int64_t end) {
  return {min(begin, end), min(begin + length, end)};
}

/// A slot's expert, -1 for a slot that does no work.
template <typename Id>
__device__ __forceinline__ int expert_of(const PlanArguments& arguments, int64_t slot, int64_t end) {
  if (slot >= end)
    return -1;
  const Id id = static_cast<const Id*>(arguments.topk_ids)[slot];
  return id >= 0 && id < arguments.num_experts ? static_cast<int>(id) : -1;
}

/// block_counts[block, e] = slots of expert e in the block's run. Shared memory: [num_experts].
template <typename Id>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize) moe_plan_count(const PlanArguments arguments) {
  extern __shared__ int counts[];
  wait_for_previous_kernels();
  let_next_kernel_start();
  for (int e = static_cast<int>(threadIdx.x); e < arguments.num_experts; e += static_cast<int>(blockDim.x)) {
    counts[e] = 0;
  }
  __syncthreads();
  const SlotRange run =
      slot_range(blockIdx.x * arguments.slots_per_block, arguments.slots_per_block, arguments.num_slots);
#pragma unroll 4
  for (int64_t slot = run.begin + threadIdx.x; slot < run.end; slot += blockDim.x) {
    const int expert = expert_of<Id>(arguments, slot, run.end);
    if (expert >= 0)
      atomicAdd(&counts[expert], 1);
  }
  __syncthreads();
  int32_t* block_counts = arguments.block_counts + static_cast<int64_t>(blockIdx.x) * arguments.num_experts;
  for (int e = static_cast<int>(threadIdx.x); e < arguments.num_experts; e += static_cast<int>(blockDim.x)) {
    block_counts[e] = counts[e];
  }
}

/// Slots of an expert in all blocks, and in earlier blocks.
struct ExpertCount {
  int total;
  int before;
};

__device__ __forceinline__ ExpertCount sum_block_counts(const PlanArguments& arguments, int expert) {
  constexpr int kAtOnce = 32;  // loads in flight: their latency is the cost
  ExpertCount count{0, 0};
  const auto num_blocks = static_cast<int>(gridDim.x);
  const auto block = static_cast<int>(blockIdx.x);
  const int32_t* block_counts = arguments.block_counts + expert;
  for (int first = 0; first < num_blocks; first += kAtOnce) {
    int32_t values[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      values[i] = first + i < num_blocks ? block_counts[(first + i) * arguments.num_experts] : 0;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      count.total += values[i];
      count.before += first + i < block ? values[i] : 0;
    }
  }
  return count;
}

/// Places the block's slots. Shared memory: the next row of each expert for each warp, [num_counting_warps,
/// num_experts].
template <typename Id>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize) moe_plan_place(const PlanArguments arguments) {
  extern __shared__ int4 place_memory[];
  int* next_rows = reinterpret_cast<int*>(place_memory);
  __shared__ int warp_sums[kMaxWarps];
  __shared__ int num_working_slots;
  wait_for_previous_kernels();
  let_next_kernel_start();

  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int num_threads = static_cast<int>(blockDim.x);
  const int num_warps = arguments.num_counting_warps;
  const int num_experts = arguments.num_experts;
  const unsigned lanes_before = (1U << lane) - 1U;
  const SlotRange run =
      slot_range(blockIdx.x * arguments.slots_per_block, arguments.slots_per_block, arguments.num_slots);
  const SlotRange own = slot_range(run.begin + warp * arguments.slots_per_warp, arguments.slots_per_warp, run.end);
  int* own_rows = next_rows + warp * num_experts;

  // Count each warp's slots.
  for (int i = static_cast<int>(threadIdx.x); i < (num_warps * num_experts + 3) / 4; i += num_threads) {
    place_memory[i] = int4{0, 0, 0, 0};
  }
  __syncthreads();
#pragma unroll 4
  for (int64_t slot = own.begin + lane; slot < own.end; slot += kWarpSize) {
    const int expert = expert_of<Id>(arguments, slot, own.end);
    if (expert >= 0)
      atomicAdd(&own_rows[expert], 1);
  }
  __syncthreads();

  // Turn counts into first rows: experts before, blocks before, warps before. A thread's experts are consecutive.
  const int experts_per_thread = (num_experts + num_threads - 1) / num_threads;
  const int first_expert = min(static_cast<int>(threadIdx.x) * experts_per_thread, num_experts);
  const int last_expert = min(first_expert + experts_per_thread, num_experts);
  int num_of_thread = 0;
  int before = 0;  // of the thread's last expert; right if it has one expert
  for (int expert = first_expert; expert < last_expert; ++expert) {
    ExpertCount count{0, 0};
    if (gridDim.x > 1) {
      count = sum_block_counts(arguments, expert);
    } else {
      for (int other = 0; other < num_warps; ++other) count.total += next_rows[other * num_experts + expert];
    }
    num_of_thread += count.total;
    before = count.before;
  }
  int offset = block_exclusive_sum(num_of_thread, warp_sums);
  if (static_cast<int>(threadIdx.x) == num_threads - 1)
    num_working_slots = offset + num_of_thread;
  for (int expert = first_expert; expert < last_expert; ++expert) {
    if (blockIdx.x == 0)
      arguments.expert_offsets[expert] = offset;
    int total = num_of_thread;
    if (experts_per_thread > 1 && gridDim.x > 1) {
      const ExpertCount count = sum_block_counts(arguments, expert);
      total = count.total;
      before = count.before;
    }
    int row = offset + before;
#pragma unroll 4
    for (int other = 0; other < num_warps; ++other) {
      int& cell = next_rows[other * num_experts + expert];
      const int count = cell;
      cell = row;
      row += count;
    }
    offset = gridDim.x > 1 ? offset + total : row;
  }
  __syncthreads();
  if (blockIdx.x == 0 && threadIdx.x == 0)
    arguments.expert_offsets[num_experts] = num_working_slots;

  // Place the slots, 32 at a time.
  int next_expert = expert_of<Id>(arguments, own.begin + lane, own.end);
  for (int64_t begin = own.begin; begin < own.end; begin += kWarpSize) {
    const int64_t slot = begin + lane;
    const int expert = next_expert;
    next_expert = expert_of<Id>(arguments, slot + kWarpSize, own.end);
    const unsigned peers = __match_any_sync(kFullMask, expert);
    const int rank = __popc(peers & lanes_before);
    int row = -1;
    if (expert >= 0)
      row = own_rows[expert] + rank;
    __syncwarp();
    if (expert >= 0 && rank == 0)
      own_rows[expert] += __popc(peers);
    __syncwarp();
    if (slot < own.end)
      arguments.slot_rows[slot] = row;
    if (row >= 0)
      arguments.row_slots[row] = static_cast<int32_t>(slot);
  }
  for (int64_t row = max(run.begin, static_cast<int64_t>(num_working_slots)) + threadIdx.x; row < run.end;
       row += num_threads) {
    arguments.row_slots[row] = -1;
  }
}

template <typename Id>
void launch_plan(const MoePlanParams& params, cudaStream_t stream) {
  const int64_t num_blocks = moe_plan_cuda_num_blocks(params.num_slots);
  const auto counts_bytes = sizeof(int) * static_cast<size_t>(params.num_experts);
  const auto round_up = [](int64_t value, int64_t step) { return (value + step - 1) / step * step; };
  const int64_t slots_per_block =
      round_up(std::max<int64_t>((params.num_slots + num_blocks - 1) / num_blocks, 1), kWarpSize);
  const auto most_warps = std::min<int64_t>(slots_per_block <= kMostSlotsOfHalfTheWarps ? kMaxWarps / 2 : kMaxWarps,
                                            static_cast<int64_t>(kMaxSharedMemory / counts_bytes));
  const int64_t slots_per_warp = round_up((slots_per_block + most_warps - 1) / most_warps, kWarpSize);
  const int64_t num_warps = (slots_per_block + slots_per_warp - 1) / slots_per_warp;
  const int64_t num_threads = std::clamp(std::max(num_warps * kWarpSize, round_up(params.num_experts, kWarpSize)),
                                         int64_t{4 * kWarpSize}, int64_t{kMaxWarps * kWarpSize});

  PlanArguments arguments{};
  arguments.topk_ids = params.topk_ids;
  arguments.expert_offsets = params.expert_offsets;
  arguments.row_slots = params.row_slots;
  arguments.slot_rows = params.slot_rows;
  arguments.block_counts = static_cast<int32_t*>(params.workspace);
  arguments.num_slots = params.num_slots;
  arguments.slots_per_block = slots_per_block;
  arguments.slots_per_warp = slots_per_warp;
  arguments.num_counting_warps = static_cast<int>(num_warps);
  arguments.num_experts = static_cast<int>(params.num_experts);
  if (num_blocks > 1) {
    launch("moe_plan", &moe_plan_count<Id>, num_blocks, kMaxWarps * kWarpSize, counts_bytes, stream, arguments);
  }
  launch("moe_plan", &moe_plan_place<Id>, num_blocks, static_cast<int>(num_threads),
         (counts_bytes * static_cast<size_t>(num_warps) + 15) / 16 * 16, stream, arguments);
}

}  // namespace
}  // namespace cuda

void moe_plan_cuda(const MoePlanParams& params, cudaStream_t stream) {
  params.validate();
  ZEXPERT_CHECK(params.num_experts <= kMaxExpertsOnCuda, "num_experts must be at most ", kMaxExpertsOnCuda,
                " on CUDA, got ", params.num_experts);
  if (moe_plan_cuda_workspace_bytes(params) > 0) {
    detail::check_pointers({{"workspace", params.workspace}});
  }
  visit_index(params.ids_type, [&](auto id) { cuda::launch_plan<decltype(id)>(params, stream); });
}

}  // namespace zexpert
