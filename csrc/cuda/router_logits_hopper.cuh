// SPDX-License-Identifier: Apache-2.0
// router_logits' kernels for Hopper: see router_logits_layout.h for their division of the work.
//
// Operands are swapped: experts are the rows of a matrix instruction, tokens its columns. A thread fills a ring of
// stages in shared memory through the copy engine: a stage is 64 elements of depth of a tile's float32 weights and of
// its hidden states. Warpgroups read their own weights, split each into a sum of 16-bit numbers, and multiply: these
// parts come from registers, the hidden states from shared memory. Hidden states are exact in 16 bits, so the weights
// alone need parts. A float16 weight would overflow or lose bits: it is first scaled by its expert's power of two.
//
// A stage's `full` barrier ends its phase when the stage's bytes are there, its `empty` barrier when all warps that
// read them are done. Both sides walk the ring in the same order, and the parity flips once per round.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/cluster_ptx.cuh"
#include "cuda/grouped_mlp/layout.h"
#include "cuda/grouped_mlp/ptx.cuh"
#include "cuda/launch.cuh"
#include "cuda/router_logits_layout.h"
#include "cuda/wgmma_registers.cuh"

namespace zexpert::cuda::router {

inline constexpr int kWarpgroupThreads = 4 * kWarpSize;
inline constexpr int kFewThreads = kWarpgroupThreads + kWarpSize;
inline constexpr int kManyThreads = (kManyWarpgroups + 1) * kWarpgroupThreads;
// Registers are moved between whole warpgroups, so the producer is one, with a single thread at work.
inline constexpr int kConsumerRegisters = 240;
inline constexpr int kProducerRegisters = 24;

struct HopperArguments {
  CUtensorMap weight;         ///< boxes of kWeightLineDepth by the tile's experts
  CUtensorMap hidden_states;  ///< boxes of kStepDepth by the tile's tokens
  const float* scales;        ///< float16: [num_experts], the powers of two that weights are multiplied by
  float* out;                 ///< logits; if units have one group, partial sums [kGroups, num_tokens, num_experts]
  int64_t num_tokens;
  int num_experts;
  int num_steps;
  Units units;  ///< some and many tokens
};

template <int kExperts, int kColumns, int kStages>
struct StageMemory {
  static constexpr int kHalfBytes = kExperts * kLineBytes;
  static constexpr int kWeightBytes = kWeightHalves * kHalfBytes;
  static constexpr int kStageBytes = kWeightBytes + kColumns * kLineBytes;
  static_assert(kHalfBytes % kSwizzleBytes == 0 && kStageBytes % kSwizzleBytes == 0);

  alignas(kSwizzleBytes) uint8_t stages[kStages][kStageBytes];  // the weights' halves, then the hidden states
  uint64_t full[kStages];
  uint64_t empty[kStages];
};

template <int kColumns, int kStages>
struct FewMemory {
  StageMemory<kFewExperts, kColumns, kStages> ring;
  alignas(16) float partial[kColumns * kPartialStride];
};

/// A place in the ring.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1U;
    }
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/// The pair as the nearest numbers of T in one register. The pair becomes what they leave of it.
template <typename T>
__device__ __forceinline__ uint32_t take_part(float2& pair);
template <>
__device__ __forceinline__ uint32_t take_part<__nv_bfloat16>(float2& pair) {
  const __nv_bfloat162 part = __floats2bfloat162_rn(pair.x, pair.y);
  const uint32_t word = *reinterpret_cast<const uint32_t*>(&part);
  pair.x -= __uint_as_float(word << 16U);
  pair.y -= __uint_as_float(word & 0xffff0000U);
  return word;
}
template <>
__device__ __forceinline__ uint32_t take_part<__half>(float2& pair) {
  const __half2 part = __floats2half2_rn(pair.x, pair.y);
  const float2 value = __half22float2(part);
  pair.x -= value.x;
  pair.y -= value.y;
  return *reinterpret_cast<const uint32_t*>(&part);
}

/// What a thread needs to read its weights, of expert_of_sum's two experts.
struct OwnWeights {
  uint32_t offset;  ///< in a stage, of its pair of depth 0
  float scales[2];  ///< float16: powers of two

  /// The warpgroup's experts begin with `first_expert`, in line `first_line` of a stage.
  template <typename T>
  __device__ __forceinline__ void init(const HopperArguments& arguments, int first_expert, int first_line) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize % 4;
    offset = static_cast<uint32_t>((first_line + 16 * warp) * kLineBytes) + weight_offset(lane, 0, 0);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scales[h] = 1;
      if constexpr (std::is_same_v<T, __half>) {
        const int expert = first_expert + expert_of_sum(warp, lane, h);
        if (expert < arguments.num_experts)
          scales[h] = __ldcg(arguments.scales + expert);
      }
    }
  }
  __device__ __forceinline__ float unscaled(float sum, int h) const { return sum * (1 / scales[h]); }
};

/// sums = 64 experts' weights times kColumns tokens over `num_steps` stages of the ring, at least one.
/// `release(stage)` is called by each warp when it is done with a stage.
template <typename T, int kParts, int kColumns, int kExperts, int kStages, typename Release>
__device__ __forceinline__ void multiply(float (&sums)[kColumns / 2], int num_steps, const OwnWeights& own,
                                         StageMemory<kExperts, kColumns, kStages>& memory, Place<kStages>& place,
                                         const Release& release) {
  using Memory = StageMemory<kExperts, kColumns, kStages>;
  uint32_t parts[2][kParts][4];
  int previous_stage = 0;
  int adds = 0;
#pragma unroll 1
  for (int step = 0; step < num_steps; ++step) {
    ptx::barrier_wait(ptx::shared_address(&memory.full[place.stage]), place.parity);
    const uint32_t stage = ptx::shared_address(memory.stages[place.stage]);
    const uint64_t hidden_states = matrix_descriptor(stage + Memory::kWeightBytes);
#pragma unroll
    for (int i = 0; i < kInstructionsPerStep; ++i) {
      auto& operand = parts[i % 2];
      // Load and split, while the instructions before are at work
      float2 pairs[4];
#pragma unroll
      for (int d = 0; d < 2; ++d) {
        // Halves and lines are whole multiples of kLineBytes: a step within the line is one in the swizzled chunk.
        const uint32_t in_line = static_cast<uint32_t>((i % 2 * kInstructionDepth + 8 * d) * 4);
        const uint32_t address = stage + static_cast<uint32_t>(i / 2 * Memory::kHalfBytes) + (own.offset ^ in_line);
        pairs[2 * d] = ptx::load_shared_pair(address);
        pairs[2 * d + 1] = ptx::load_shared_pair(address + kSwizzleBytes);
      }
      ptx::wgmma_wait<1>();  // so that those that read this operand are over
      if (i == 1 && step > 0)
        release(previous_stage);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if constexpr (std::is_same_v<T, __half>)
          pairs[k] = make_float2(pairs[k].x * own.scales[k % 2], pairs[k].y * own.scales[k % 2]);
#pragma unroll
        for (int part = 0; part < kParts; ++part) operand[part][k] = take_part<T>(pairs[k]);
      }
      // Multiply
      ptx::wgmma_fence();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        WgmmaRegisters<T, kColumns>::add(sums, operand[part],
                                         hidden_states + static_cast<uint64_t>(i) * kDescriptorStep,
                                         part == 0 && i == 0 ? adds : 1);
      }
      ptx::wgmma_commit();
      adds = 1;
    }
    previous_stage = place.stage;
    place.advance();
  }
  ptx::wgmma_wait<0>();
  release(previous_stage);
#pragma unroll
  for (float& sum : sums) ptx::pin(sum);
}

/// totals = the sum of a group, chunk by chunk.
template <typename T, int kParts, int kColumns, int kExperts, int kStages, typename Release>
__device__ __forceinline__ void multiply_group(float (&totals)[kColumns / 2], int group, int num_steps,
                                               const OwnWeights& own, StageMemory<kExperts, kColumns, kStages>& memory,
                                               Place<kStages>& place, const Release& release) {
#pragma unroll
  for (float& total : totals) total = 0.0F;
  const int end = first_step(group + 1, num_steps);
#pragma unroll 1
  for (int step = first_step(group, num_steps); step < end; step += kChunkSteps) {
    float sums[kColumns / 2];
    multiply<T, kParts>(sums, min(kChunkSteps, end - step), own, memory, place, release);
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) totals[i] += sums[i];
  }
}

__device__ __forceinline__ uint32_t misalignment(const void* memory) {
  return (kSwizzleBytes - ptx::shared_address(memory) % kSwizzleBytes) % kSwizzleBytes;
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

/// A cluster of kGroups blocks for kFewExperts experts and all tokens, at most kColumns: block g multiplies group g.
template <typename T, int kParts, int kColumns, int kStages>
__global__ void __launch_bounds__(kFewThreads, 1) few_tokens(const __grid_constant__ HopperArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Memory = FewMemory<kColumns, kStages>;
  using Ring = StageMemory<kFewExperts, kColumns, kStages>;
  extern __shared__ uint8_t unaligned_memory[];
  Memory& memory = *reinterpret_cast<Memory*>(unaligned_memory + misalignment(unaligned_memory));
  const int group = static_cast<int>(ptx::cluster_rank());
  const int first_expert = static_cast<int>(blockIdx.x) / kGroups * kFewExperts;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(ptx::shared_address(&memory.ring.full[stage]), 1);
      ptx::barrier_init(ptx::shared_address(&memory.ring.empty[stage]), 4);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();

  if (threadIdx.x == kWarpgroupThreads) {  // Load
    const int begin = first_step(group, arguments.num_steps);
    const int end = first_step(group + 1, arguments.num_steps);
    ptx::prefetch_tensor_map(arguments.hidden_states);
    // The cache holds what the kernel before writes too, so weights may come there early.
    for (int step = begin; step < end; ++step) {
      for (int half = 0; half < kWeightHalves; ++half) {
        ptx::prefetch_box_2d(arguments.weight, step * kStepDepth + half * kWeightLineDepth, first_expert);
      }
    }
    wait_for_previous_kernels();
    ptx::fence_async_proxy();
    const uint64_t policy = ptx::evict_normal();
    Place<kStages> place;
    for (int step = begin; step < end; ++step) {
      const uint32_t full = ptx::shared_address(&memory.ring.full[place.stage]);
      const uint32_t stage = ptx::shared_address(memory.ring.stages[place.stage]);
      ptx::barrier_wait(ptx::shared_address(&memory.ring.empty[place.stage]), place.parity ^ 1U);
      ptx::barrier_arrive_and_expect(full, Ring::kStageBytes);
      for (int half = 0; half < kWeightHalves; ++half) {
        ptx::load_box_2d(stage + static_cast<uint32_t>(half * Ring::kHalfBytes), arguments.weight, full, policy,
                         step * kStepDepth + half * kWeightLineDepth, first_expert);
      }
      ptx::load_box_2d(stage + Ring::kWeightBytes, arguments.hidden_states, full, policy, step * kStepDepth, 0);
      place.advance();
    }
  } else {
    wait_for_previous_kernels();
    let_next_kernel_start();
    if (threadIdx.x < kWarpgroupThreads) {  // Multiply
      const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
      const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
      OwnWeights own;
      own.template init<T>(arguments, first_expert, 0);
      const auto release = [&](int stage) {
        if (lane == 0)
          ptx::barrier_arrive(ptx::shared_address(&memory.ring.empty[stage]));
      };
      Place<kStages> place;
      float totals[kColumns / 2];
      multiply_group<T, kParts>(totals, group, arguments.num_steps, own, memory.ring, place, release);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            memory.partial[token_of_sum(lane, j, i) * kPartialStride + expert_of_sum(warp, lane, h)] =
                own.unscaled(totals[4 * j + 2 * h + i], h);
          }
        }
      }
    }
  }
  __syncwarp();
  ptx::cluster_sync();

  // Add the groups and write: each block a part of the tokens, 4 experts per thread and turn
  if (threadIdx.x < kWarpgroupThreads) {
    constexpr int kTokens = kColumns / kGroups;
    constexpr int kVectors = kFewExperts / 4;
    const bool stores_vectors = arguments.num_experts % 4 == 0;
    for (int i = static_cast<int>(threadIdx.x); i < kTokens * kVectors; i += kWarpgroupThreads) {
      const int token = group * kTokens + i / kVectors;
      const int in_tile = i % kVectors * 4;
      const uint32_t address = ptx::shared_address(memory.partial + token * kPartialStride + in_tile);
      float4 parts[kGroups];
#pragma unroll
      for (int g = 0; g < kGroups; ++g) parts[g] = ptx::load_in_cluster(ptx::address_in_block(address, g));
      float sums[4] = {};
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        sums[0] += parts[g].x;
        sums[1] += parts[g].y;
        sums[2] += parts[g].z;
        sums[3] += parts[g].w;
      }
      const int expert = first_expert + in_tile;
      if (token >= arguments.num_tokens || expert >= arguments.num_experts)
        continue;
      float* const out = arguments.out + int64_t{token} * arguments.num_experts + expert;
      if (stores_vectors) {
        *reinterpret_cast<float4*>(out) = make_float4(sums[0], sums[1], sums[2], sums[3]);
      } else {
        for (int k = 0; k < min(4, arguments.num_experts - expert); ++k) out[k] = sums[k];
      }
    }
  }
  ptx::cluster_sync();  // others may still read this block's sums
#else
  __trap();  // wgmma is in code for sm_90a alone, and the launcher asks whether that is there
#endif
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ int first_token(const Unit& unit) {
  return (unit.pair * kPair + static_cast<int>(ptx::cluster_rank())) * kManyTokens;
}

/// Calls fn(unit) for the units of this block's pair.
template <typename Fn>
__device__ __forceinline__ void for_each_unit(const Units& units, const Fn& fn) {
  const int num_units = units.count();
  for (int i = static_cast<int>(blockIdx.x) / kPair; i < num_units; i += static_cast<int>(gridDim.x) / kPair)
    fn(units[i]);
}

/// One thread. Both blocks of a pair have the same experts, so each loads half of the weights, into both.
template <int kStages>
__device__ __forceinline__ void load_units(const HopperArguments& arguments,
                                           StageMemory<kManyExperts, kManyTokens, kStages>& memory) {
  using Memory = StageMemory<kManyExperts, kManyTokens, kStages>;
  constexpr auto kBothBlocks = static_cast<uint16_t>((1U << kPair) - 1U);
  const auto half = static_cast<int>(ptx::cluster_rank());
  const uint64_t policy = ptx::evict_normal();
  Place<kStages> place;
  for_each_unit(arguments.units, [&](const Unit& unit) {
    const int end = first_step(unit.last_group, arguments.num_steps);
    for (int step = first_step(unit.first_group, arguments.num_steps); step < end; ++step) {
      const uint32_t full = ptx::shared_address(&memory.full[place.stage]);
      const uint32_t stage = ptx::shared_address(memory.stages[place.stage]);
      ptx::barrier_wait_for_cluster(ptx::shared_address(&memory.empty[place.stage]), place.parity ^ 1U);
      ptx::barrier_arrive_and_expect(full, Memory::kStageBytes);
      ptx::load_box_2d_into_blocks(stage + static_cast<uint32_t>(half * Memory::kHalfBytes), arguments.weight, full,
                                   kBothBlocks, step * kStepDepth + half * kWeightLineDepth,
                                   unit.expert_tile * kManyExperts);
      ptx::load_box_2d(stage + Memory::kWeightBytes, arguments.hidden_states, full, policy, step * kStepDepth,
                       first_token(unit));
      place.advance();
    }
  });
}

/// Writes a thread's sums. `expert` and `token` are those of its first.
__device__ __forceinline__ void write_sums(const float (&sums)[kManyTokens / 2], const OwnWeights& own, float* out,
                                           int expert, int token, int num_experts, int64_t num_tokens) {
  const bool has_first = expert < num_experts;
  const bool has_second = expert + 8 < num_experts;
  const int64_t row_stride = num_experts;
  out += token * row_stride + expert;
#pragma unroll
  for (int j = 0; j < kManyTokens / 8; ++j) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool has_token = token + 8 * j + i < num_tokens;
      if (has_token && has_first)
        out[i * row_stride] = own.unscaled(sums[4 * j + i], 0);
      if (has_token && has_second)
        out[i * row_stride + 8] = own.unscaled(sums[4 * j + 2 + i], 1);
    }
    out += 8 * row_stride;
  }
}

/// A warpgroup's part of all units.
template <typename T, int kParts, int kStages>
__device__ __forceinline__ void multiply_units(const HopperArguments& arguments,
                                               StageMemory<kManyExperts, kManyTokens, kStages>& memory) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const auto release = [&](int stage) {
    if (lane < kPair)
      ptx::barrier_arrive_in_cluster(ptx::address_in_block(ptx::shared_address(&memory.empty[stage]), lane));
  };
  Place<kStages> place;
  for_each_unit(arguments.units, [&](const Unit& unit) {
    const int first_line = static_cast<int>(threadIdx.x) / kWarpgroupThreads * kInstructionRows;
    const int first_expert = unit.expert_tile * kManyExperts + first_line;
    OwnWeights own;
    own.template init<T>(arguments, first_expert, first_line);
    float totals[kManyTokens / 2] = {};
#pragma unroll 1
    for (int group = unit.first_group; group < unit.last_group; ++group) {
      float sums[kManyTokens / 2];
      multiply_group<T, kParts>(sums, group, arguments.num_steps, own, memory, place, release);
#pragma unroll
      for (int i = 0; i < kManyTokens / 2; ++i) totals[i] += sums[i];
    }
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize % 4;
    float* const out = arguments.out + unit.first_group * arguments.num_tokens * arguments.num_experts;
    write_sums(totals, own, out, first_expert + expert_of_sum(warp, lane, 0),
               first_token(unit) + token_of_sum(lane, 0, 0), arguments.num_experts, arguments.num_tokens);
  });
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

/// Pairs of blocks work off the units in turn.
template <typename T, int kParts, int kStages>
__global__ void __launch_bounds__(kManyThreads, 1) many_tokens(const __grid_constant__ HopperArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Memory = StageMemory<kManyExperts, kManyTokens, kStages>;
  extern __shared__ uint8_t unaligned_memory[];
  Memory& memory = *reinterpret_cast<Memory*>(unaligned_memory + misalignment(unaligned_memory));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(ptx::shared_address(&memory.full[stage]), 1);
      ptx::barrier_init(ptx::shared_address(&memory.empty[stage]), kPair * kManyWarpgroups * 4);
    }
    ptx::fence_barrier_init();
  }
  ptx::cluster_sync();  // before anything comes from the other block

  if (threadIdx.x < kManyWarpgroups * kWarpgroupThreads) {
    wait_for_previous_kernels();
    let_next_kernel_start();
    ptx::raise_registers<kConsumerRegisters>();
    multiply_units<T, kParts>(arguments, memory);
  } else {
    ptx::lower_registers<kProducerRegisters>();
    if (threadIdx.x == kManyWarpgroups * kWarpgroupThreads) {
      ptx::prefetch_tensor_map(arguments.weight);
      ptx::prefetch_tensor_map(arguments.hidden_states);
      wait_for_previous_kernels();
      ptx::fence_async_proxy();
      load_units(arguments, memory);
    }
  }
  __syncwarp();
  ptx::cluster_sync();  // the other block may still load into this one's memory, or arrive at its barriers
#else
  __trap();
#endif
}

}  // namespace zexpert::cuda::router
