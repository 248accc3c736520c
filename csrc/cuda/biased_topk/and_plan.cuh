// SPDX-License-Identifier: Apache-2.0
// The routing of warp.cuh and the plan of its slots in one launch, for few tokens: all blocks form one cluster.
//
// A token chooses an expert at most once. So the tokens that chose an expert are a set with a bit per token, and the
// plan needs neither sorting nor an order among threads: a slot's row is its expert's first row plus the number of
// earlier tokens in the set. All blocks write their tokens into the shared memory of the first block, which makes the
// plan.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/biased_topk/warp.cuh"
#include "cuda/host_device.h"
#include "cuda/launch.cuh"
#include "zexpert/biased_topk.h"
#include "zexpert/moe_plan.h"

namespace zexpert::cuda {

inline constexpr int kMaxPlannedWarps = 16;  // per block
inline constexpr int kTokensPerWord = 32;
inline constexpr int kExpertsPerThread = 4;  // a thread of the planning block sums up a vector of sets

/// Outputs of routing and plan.
struct PlannedRouting {
  RoutingOutputs routing;
  MoePlanParams plan;
};

/// floor(slot / top_k) for slots below kMaxPlannedSlots and top_k up to 32, without a division per slot.
class TokenOfSlot {
 public:
  explicit TokenOfSlot(unsigned top_k) : inverse_(((1U << kShift) + top_k - 1) / top_k) {}
  __device__ int operator()(int slot) const {
    return static_cast<int>(static_cast<unsigned>(slot) * inverse_ >> kShift);
  }

 private:
  static constexpr int kShift = 20;
  unsigned inverse_;
};

struct PlanOutputs {
  int32_t* expert_offsets;
  int32_t* row_slots;
  int32_t* slot_rows;
  TokenOfSlot token_of_slot;
};

/// The shared memory of the block that plans: offsets in bytes, all of them multiples of 16.
struct PlanLayout {
  int num_experts;
  int expert_stride;  // num_experts rounded up
  int num_words;      // of a set of tokens
  int num_slots;

  __host__ __device__ explicit PlanLayout(const RoutingArguments& arguments)
      : num_experts(arguments.num_real_experts),
        expert_stride(round_up(num_experts, 8)),
        num_words(round_up(static_cast<int>(arguments.num_tokens), kTokensPerWord) / kTokensPerWord),
        num_slots(static_cast<int>(arguments.num_tokens) * arguments.top_k) {}

  /// uint32_t [num_words, expert_stride]: bit t % 32 of word t / 32 is set if token t chose the expert.
  __host__ __device__ int tokens() const { return 0; }
  /// int16_t [num_slots]: a row's slot, -1 for none.
  __host__ __device__ int row_slots() const { return num_words * expert_stride * 4; }
  /// int16_t [num_slots]: a slot's real expert, -1 for none.
  __host__ __device__ int experts() const { return row_slots() + round_up(num_slots * 2, 16); }
  /// int16_t [num_words, expert_stride]: row of the first of the word's tokens.
  __host__ __device__ int first_rows() const { return experts() + round_up(num_slots * 2, 16); }
  __host__ __device__ int num_bytes() const { return first_rows() + num_words * expert_stride * 2; }
};

/// Output of route_token that hands the lane's slot back to the kernel.
struct SlotOfLane {
  Slot& slot;
};

template <bool kCareful, typename Layout, typename Logit>
__device__ __forceinline__ void finish_token(const RoutingArguments&, const SlotOfLane& output, int64_t, int, Slot slot,
                                             RowScale) {
  output.slot = slot;
}

#if __CUDA_ARCH__ >= 900

// The shared memory of a cluster's first block. Addresses are 32-bit.

__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

__device__ __forceinline__ unsigned address_in_first_block(const void* own) {
  auto address = static_cast<unsigned>(__cvta_generic_to_shared(own));
  asm("mapa.shared::cluster.u32 %0, %0, 0;" : "+r"(address));
  return address;
}

__device__ __forceinline__ void or_in_first_block(unsigned address, unsigned bits) {
  asm volatile("red.relaxed.cluster.shared::cluster.or.b32 [%0], %1;" ::"r"(address), "r"(bits) : "memory");
}

__device__ __forceinline__ void store_in_first_block(unsigned address, int16_t value) {
  asm volatile("st.shared::cluster.b16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}

/// Makes the sets empty and the rows' slots -1. The whole block calls it.
__device__ __forceinline__ void clear_plan(const PlanLayout& layout, unsigned char* memory) {
  constexpr int kBytes = static_cast<int>(sizeof(uint4));
  for (int i = static_cast<int>(threadIdx.x); i < layout.experts() / kBytes; i += static_cast<int>(blockDim.x)) {
    const unsigned word = i < layout.row_slots() / kBytes ? 0U : ~0U;
    reinterpret_cast<uint4*>(memory)[i] = uint4{word, word, word, word};
  }
}

/// Adds a slot to the plan of a block that is alone.
__device__ __forceinline__ void enter_slot(const PlanLayout& layout, unsigned char* memory, int token, int slot,
                                           int expert) {
  reinterpret_cast<int16_t*>(memory + layout.experts())[slot] = static_cast<int16_t>(expert);
  if (expert >= 0) {
    const int word = token / kTokensPerWord * layout.expert_stride + expert;
    atomicOr(reinterpret_cast<unsigned*>(memory + layout.tokens()) + word, 1U << token % kTokensPerWord);
  }
}

/// The same, in the shared memory of the cluster's first block.
__device__ __forceinline__ void enter_slot_in_first_block(const PlanLayout& layout, const unsigned char* memory,
                                                          int token, int slot, int expert) {
  const unsigned first = address_in_first_block(memory);
  store_in_first_block(first + static_cast<unsigned>(layout.experts() + slot * 2), static_cast<int16_t>(expert));
  if (expert >= 0) {
    const int word = token / kTokensPerWord * layout.expert_stride + expert;
    or_in_first_block(first + static_cast<unsigned>(layout.tokens() + word * 4), 1U << token % kTokensPerWord);
  }
}

/// Writes the plan of the slots that were added. The whole block calls it, after a barrier; the block has a thread for
/// every kExpertsPerThread experts.
__device__ __forceinline__ void write_plan(const PlanLayout& layout, unsigned char* memory, const PlanOutputs& plan) {
  __shared__ int warp_sums[kMaxPlannedWarps];
  const auto thread = static_cast<int>(threadIdx.x);
  const auto num_threads = static_cast<int>(blockDim.x);
  const int stride = layout.expert_stride;
  const auto* tokens = reinterpret_cast<const unsigned*>(memory + layout.tokens());
  auto* first_rows = reinterpret_cast<int16_t*>(memory + layout.first_rows());
  auto* row_slots = reinterpret_cast<int16_t*>(memory + layout.row_slots());
  const auto* experts = reinterpret_cast<const int16_t*>(memory + layout.experts());

  // Count each expert's slots.
  const int first_expert = thread * kExpertsPerThread;
  int counts[kExpertsPerThread] = {};
  if (first_expert < stride) {
    for (int word = 0; word < layout.num_words; ++word) {
      const uint4 sets = *reinterpret_cast<const uint4*>(tokens + word * stride + first_expert);
      counts[0] += __popc(sets.x);
      counts[1] += __popc(sets.y);
      counts[2] += __popc(sets.z);
      counts[3] += __popc(sets.w);
    }
  }

  // Turn counts into first rows.
  int row = block_exclusive_sum(counts[0] + counts[1] + counts[2] + counts[3], warp_sums);
  if (first_expert < stride) {
    int rows[kExpertsPerThread];
#pragma unroll
    for (int i = 0; i < kExpertsPerThread; ++i) {
      const int expert = first_expert + i;
      rows[i] = row;
      row += counts[i];
      if (expert < layout.num_experts)
        plan.expert_offsets[expert] = rows[i];
      if (expert == layout.num_experts - 1)
        plan.expert_offsets[layout.num_experts] = row;
    }
    for (int word = 0; word < layout.num_words; ++word) {
      const int first = word * stride + first_expert;
      const uint4 sets = *reinterpret_cast<const uint4*>(tokens + first);
      *reinterpret_cast<short4*>(first_rows + first) =
          short4{static_cast<int16_t>(rows[0]), static_cast<int16_t>(rows[1]), static_cast<int16_t>(rows[2]),
                 static_cast<int16_t>(rows[3])};
      rows[0] += __popc(sets.x);
      rows[1] += __popc(sets.y);
      rows[2] += __popc(sets.z);
      rows[3] += __popc(sets.w);
    }
  }
  __syncthreads();

  // Place the slots. Rows are scattered, so they are collected in shared memory and written in order.
  for (int slot = thread; slot < layout.num_slots; slot += num_threads) {
    const int expert = experts[slot];
    int row = -1;
    if (expert >= 0) {
      const int token = plan.token_of_slot(slot);
      const int word = token / kTokensPerWord * stride + expert;
      const unsigned earlier = (1U << token % kTokensPerWord) - 1U;
      row = first_rows[word] + __popc(tokens[word] & earlier);
      row_slots[row] = static_cast<int16_t>(slot);
    }
    plan.slot_rows[slot] = row;
  }
  __syncthreads();
  for (int row = thread; row < layout.num_slots; row += num_threads) plan.row_slots[row] = row_slots[row];
}

#endif  // __CUDA_ARCH__ >= 900

/// All blocks are one cluster. Dynamic shared memory: PlanLayout, then routing_memory_floats().
template <typename Logit, int kWidth>
__global__ void __launch_bounds__(kMaxPlannedWarps* kWarpSize, 1)
    biased_topk_and_plan_warp(const RoutingArguments arguments, const RoutingOutputs outputs, const PlanOutputs plan) {
#if __CUDA_ARCH__ >= 900
  using Layout = RowLayout<Logit, kWidth>;
  __shared__ float4 scratch_memory[kMaxPlannedWarps][WarpScratch::kBytes / sizeof(float4)];
  extern __shared__ uint4 plan_memory[];
  auto* memory = reinterpret_cast<unsigned char*>(plan_memory);
  const PlanLayout layout(arguments);
  const bool is_alone = gridDim.x == 1;

  // This does not depend on earlier kernels. The first block must have done it before another block writes into its
  // memory.
  if (blockIdx.x == 0)
    clear_plan(layout, memory);
  if (is_alone) {
    __syncthreads();
  } else {
    cluster_arrive();
  }
  wait_for_previous_kernels();
  let_next_kernel_start();

  const auto lane = static_cast<int>(threadIdx.x % kWarpSize);
  const unsigned warp = threadIdx.x / kWarpSize;
  const auto token = static_cast<int>(blockIdx.x * (blockDim.x / kWarpSize) + warp);
  auto* dynamic_floats = reinterpret_cast<float*>(memory + layout.num_bytes());
  const float* bias = prepare_bias(arguments, kWidth, dynamic_floats);
  Slot slot{kWarpSize, -1, 0.0F};
  const bool has_token = token < arguments.num_tokens;
  if (has_token) {
    const SlotOfLane output{slot};
    const WarpScratch scratch(scratch_memory[warp]);
    const bool may_be_ordinary = arguments.num_experts == kWidth && arguments.topk_group == arguments.num_expert_group;
    if (!may_be_ordinary ||
        !route_token<false, Layout, Logit>(arguments, output, bias, token, lane, scratch, nullptr)) {
      __syncwarp();
      float* row_keys =
          dynamic_floats + kWidth + static_cast<int>(warp) * (arguments.num_experts + arguments.num_expert_group);
      route_token<true, Layout, Logit>(arguments, output, bias, token, lane, scratch, row_keys);
    }
  }
  const auto write_token = [&] {
    const Slot slots[1] = {slot};
    if (has_token)
      write_routing(arguments, outputs, token, lane, slots);
  };

  const bool is_entered = has_token && slot.is_of_row(arguments);
  const int index = token * arguments.top_k + slot.index;
  const int expert = slot.expert < arguments.num_real_experts ? slot.expert : -1;
  if (is_alone) {
    if (is_entered)
      enter_slot(layout, memory, token, index, expert);
    write_token();
    __syncthreads();
  } else {
    cluster_wait();
    if (is_entered)
      enter_slot_in_first_block(layout, memory, token, index, expert);
    cluster_arrive();
    write_token();  // after the arrival, which would otherwise wait for these writes
    cluster_wait();
    if (blockIdx.x != 0)
      return;
  }
  write_plan(layout, memory, plan);
#endif  // __CUDA_ARCH__ >= 900
}

/// Starts the kernel with `warps_per_block` warps per block or more. Returns false, and starts nothing, if the device
/// cannot run it.
template <typename Logit, int kWidth>
bool launch_planned(const RoutingArguments& arguments, const PlannedRouting& outputs, int warps_per_block,
                    cudaStream_t stream) {
  const auto kernel = &biased_topk_and_plan_warp<Logit, kWidth>;
  if (!is_for_hopper_or_later("biased_topk_and_plan", kernel)) {
    return false;
  }
  const PlanLayout layout(arguments);
  const int num_warps =
      std::max(round_up(layout.expert_stride / kExpertsPerThread, kWarpSize) / kWarpSize, warps_per_block);
  const int num_blocks = (static_cast<int>(arguments.num_tokens) + num_warps - 1) / num_warps;
  int cluster_size = 1;
  while (cluster_size < num_blocks) cluster_size *= 2;
  const auto num_bytes = static_cast<size_t>(layout.num_bytes()) +
                         sizeof(float) * static_cast<size_t>(routing_memory_floats(arguments, kWidth, num_warps));
  const MoePlanParams& params = outputs.plan;
  const PlanOutputs plan{params.expert_offsets, params.row_slots, params.slot_rows,
                         TokenOfSlot(static_cast<unsigned>(arguments.top_k))};
  return launch_clusters("biased_topk_and_plan", kernel, cluster_size, cluster_size, num_warps * kWarpSize, num_bytes,
                         stream, arguments, outputs.routing, plan);
}

/// The overload for routing and plan: two launches if the device cannot run the one.
template <typename Logit, int kWidth>
void launch_biased_topk_warp(const RoutingArguments& arguments, const PlannedRouting& outputs, cudaStream_t stream) {
  // As few tokens per multiprocessor as a cluster allows.
  constexpr int64_t kTokensOfSmallBlocks = 128;
  const int warps_per_block = arguments.num_tokens <= kTokensOfSmallBlocks ? 8 : kMaxPlannedWarps;
  if (!launch_planned<Logit, kWidth>(arguments, outputs, warps_per_block, stream)) {
    launch_biased_topk_warp<Logit, kWidth>(arguments, outputs.routing, stream);
    moe_plan_cuda(outputs.plan, stream);
  }
}

}  // namespace zexpert::cuda
