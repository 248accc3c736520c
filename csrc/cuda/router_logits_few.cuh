// SPDX-License-Identifier: Apache-2.0
// router_logits for few tokens on Hopper: see router_logits_layout.h.
//
// A cluster of kGroups blocks has 64 experts and all tokens, and block g multiplies group g. One thread fills a ring of
// stages through the copy engine: a stage is 64 elements of depth of float32 weights and of hidden states. A warpgroup
// turns bfloat16 hidden states into scaled float16 where they are. Multipliers, a warpgroup each, split the weights in
// registers and multiply: the parts come from registers, the hidden states from shared memory. Up to 64 tokens have
// two, each with every other stage, and the second hands its sums to the first, which adds all in order. More tokens
// have one: its sums need all registers.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "cuda/cluster_ptx.cuh"
#include "cuda/grouped_mlp/layout.h"
#include "cuda/launch.cuh"
#include "cuda/router_logits_numbers.cuh"
#include "cuda/wgmma_registers.cuh"

namespace zexpert::cuda::router {

ZEXPERT_HOST_DEVICE constexpr int num_multipliers(int columns) { return columns <= 64 ? 2 : 1; }
ZEXPERT_HOST_DEVICE constexpr int few_threads(int columns) {
  return (num_multipliers(columns) + 2) * kWarpgroupThreads;
}
ZEXPERT_HOST_DEVICE constexpr int multiplier_registers(int columns) { return columns <= 64 ? 192 : 240; }
constexpr int converter_registers(int columns) { return columns <= 64 ? 96 : 80; }

struct FewArguments {
  CUtensorMap weight;         ///< boxes of kWeightLineDepth by kFewExperts
  CUtensorMap hidden_states;  ///< boxes of kStepDepth by the kernel's columns
  float* logits;
  int64_t num_tokens;
  int num_experts;
  int num_steps;
};

template <int kColumns, int kStages>
struct FewMemory {
  static constexpr int kHalfBytes = kFewExperts * kLineBytes;
  static constexpr int kWeightBytes = kWeightHalves * kHalfBytes;
  static constexpr int kStageBytes = kWeightBytes + kColumns * kLineBytes;
  static_assert(kHalfBytes % kSwizzleBytes == 0 && kStageBytes % kSwizzleBytes == 0);

  alignas(kSwizzleBytes) uint8_t stages[kStages][kStageBytes];  // the weights' halves, then the hidden states
  alignas(16) float partial[kColumns * kPartialStride];
  float inverse_scales[kStages][kColumns];  // of the hidden states
  // What the second multiplier hands over: its sums by sum and thread, and their inverse scales
  float handed_sums[num_multipliers(kColumns) == 2 ? kColumns / 2 : 1][kWarpgroupThreads];
  float handed_scales[kColumns];
  uint64_t handed;
  uint64_t taken;
  uint64_t full[kStages];
  uint64_t converted[kStages];
  uint64_t empty[kStages];
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

/// One thread: fills the ring with the steps begin .. end - 1.
template <int kColumns, int kStages>
__device__ __forceinline__ void load_few(const FewArguments& arguments, FewMemory<kColumns, kStages>& memory,
                                         int first_expert, int begin, int end) {
  using Memory = FewMemory<kColumns, kStages>;
  ptx::prefetch_tensor_map(arguments.hidden_states);
  // The cache holds what the kernel before writes too, so weights may come there early.
  for (int step = begin; step < end; ++step) {
    for (int half = 0; half < kWeightHalves; ++half) {
      ptx::prefetch_box_2d(arguments.weight, step * kStepDepth + half * kWeightLineDepth, first_expert);
    }
  }
  wait_for_previous_kernels();
  const uint64_t policy = ptx::evict_normal();
  Place<kStages> place;
  for (int step = begin; step < end; ++step) {
    const uint32_t full = ptx::shared_address(&memory.full[place.stage]);
    const uint32_t stage = ptx::shared_address(memory.stages[place.stage]);
    ptx::barrier_wait(ptx::shared_address(&memory.empty[place.stage]), place.parity ^ 1U);
    ptx::barrier_arrive_and_expect(full, Memory::kStageBytes);
    ptx::load_box_2d(stage + Memory::kWeightBytes, arguments.hidden_states, full, policy, step * kStepDepth, 0);
    for (int half = 0; half < kWeightHalves; ++half) {
      ptx::load_box_2d(stage + static_cast<uint32_t>(half * Memory::kHalfBytes), arguments.weight, full, policy,
                       step * kStepDepth + half * kWeightLineDepth, first_expert);
    }
    place.advance();
  }
}

/// A warpgroup: hidden states of `num_steps` stages from bfloat16 to scaled float16. 8 lanes share a token's line.
template <int kColumns, int kStages>
__device__ __forceinline__ void convert_tokens(FewMemory<kColumns, kStages>& memory, int num_steps) {
  constexpr int kLanes = kLineBytes / 16;
  constexpr int kUnits = kColumns * kLanes;  // of 16 bytes
  constexpr int kOwnUnits = kUnits < kWarpgroupThreads ? 1 : kUnits / kWarpgroupThreads;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  const bool has_units = thread < kUnits;  // whole warps
  Place<kStages> place;
#pragma unroll 1
  for (int step = 0; step < num_steps; ++step) {
    ptx::barrier_wait(ptx::shared_address(&memory.full[place.stage]), place.parity);
    if (has_units) {
      auto* const units =
          reinterpret_cast<uint4*>(memory.stages[place.stage] + FewMemory<kColumns, kStages>::kWeightBytes);
      uint4 pairs[kOwnUnits];
      uint32_t largest[kOwnUnits];
#pragma unroll
      for (int i = 0; i < kOwnUnits; ++i) pairs[i] = units[thread + i * kWarpgroupThreads];
#pragma unroll
      for (int i = 0; i < kOwnUnits; ++i)
        largest[i] = larger(larger(pairs[i].x, pairs[i].y), larger(pairs[i].z, pairs[i].w));
#pragma unroll
      for (int offset = 1; offset < kLanes; offset *= 2) {
#pragma unroll
        for (int i = 0; i < kOwnUnits; ++i)
          largest[i] = larger(largest[i], __shfl_xor_sync(kFullMask, largest[i], offset));
      }
#pragma unroll
      for (int i = 0; i < kOwnUnits; ++i) {
        const uint32_t scale = token_scale(larger(largest[i], largest[i] << 16U) & 0xffff0000U);
        const float factor = __uint_as_float(scale);
        pairs[i].x = scaled_tokens(pairs[i].x, factor);
        pairs[i].y = scaled_tokens(pairs[i].y, factor);
        pairs[i].z = scaled_tokens(pairs[i].z, factor);
        pairs[i].w = scaled_tokens(pairs[i].w, factor);
        units[thread + i * kWarpgroupThreads] = pairs[i];
        if (thread % kLanes == 0) {
          memory.inverse_scales[place.stage][(thread + i * kWarpgroupThreads) / kLanes] =
              __uint_as_float(inverse_scale(scale));
        }
      }
    }
    ptx::fence_async_proxy_of_block();
    __syncwarp();
    if (thread % kWarpSize == 0)
      ptx::barrier_arrive(ptx::shared_address(&memory.converted[place.stage]));
    place.advance();
  }
}

/// A chunk of a thread's two experts, split for the instructions.
struct FewOperands {
  uint32_t high[kInstructionsPerStep][4];
  uint32_t low[kInstructionsPerStep][4];
  float inverse_scales[2];
};

/// The thread's weights of an instruction: pairs[2 * d + h]. `weights` is the address of the stage's weights, `offset`
/// that of the thread's own pair of depth 0.
__device__ __forceinline__ void load_pairs(float2 (&pairs)[4], uint32_t weights, uint32_t offset, int instruction) {
  constexpr uint32_t kHalfBytes = kFewExperts * kLineBytes;
#pragma unroll
  for (int d = 0; d < 2; ++d) {
    // Halves and lines are whole multiples of kLineBytes: a step within the line is one in the swizzled chunk.
    const auto in_line = static_cast<uint32_t>((instruction % 2 * kInstructionDepth + 8 * d) * 4);
    const uint32_t address = weights + static_cast<uint32_t>(instruction / 2) * kHalfBytes + (offset ^ in_line);
    pairs[2 * d] = ptx::load_shared_pair(address);
    pairs[2 * d + 1] = ptx::load_shared_pair(address + kSwizzleBytes);
  }
}

/// Loads a chunk of weights and splits it.
__device__ __forceinline__ void load_weights(FewOperands& operands, uint32_t weights, uint32_t offset) {
  float2 pairs[kInstructionsPerStep][4];
  float largest[2] = {};
#pragma unroll
  for (int i = 0; i < kInstructionsPerStep; ++i) {
    load_pairs(pairs[i], weights, offset, i);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      largest[k % 2] = fmaxf(largest[k % 2], fmaxf(fabsf(pairs[i][k].x), fabsf(pairs[i][k].y)));
  }
  // Scale: 4 lanes share an expert
  float scales[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    largest[h] = fmaxf(largest[h], __shfl_xor_sync(kFullMask, largest[h], 1));
    largest[h] = fmaxf(largest[h], __shfl_xor_sync(kFullMask, largest[h], 2));
    const uint32_t scale = weight_scale(__float_as_uint(largest[h]));
    scales[h] = __uint_as_float(scale);
    operands.inverse_scales[h] = __uint_as_float(inverse_scale(scale));
  }
  // Split
#pragma unroll
  for (int i = 0; i < kInstructionsPerStep; ++i) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const SplitWeights parts = split(pairs[i][k], scales[k % 2]);
      operands.high[i][k] = parts.high;
      operands.low[i][k] = parts.low;
    }
  }
}

/// A multiplier: of the group's `num_steps` stages, `first` and every num_multipliers() after it. Calls finish(sums,
/// inverse scales of the thread's experts, stage, step) for each. Where registers suffice, the next stage's weights are
/// split while matrix instructions multiply this one's.
template <typename T, int kColumns, int kStages, typename Finish>
__device__ __forceinline__ void multiply_few(int first, int num_steps, FewMemory<kColumns, kStages>& memory,
                                             const Finish& finish) {
  constexpr int kStride = num_multipliers(kColumns);
  constexpr bool kLoadsAhead = kStride == 2;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize % 4;
  const uint32_t offset = static_cast<uint32_t>(16 * warp * kLineBytes) + weight_offset(lane, 0, 0);
  Place<kStages> place;
  for (int i = 0; i < first; ++i) place.advance();
  const auto load = [&](FewOperands& operands) {
    ptx::barrier_wait(ptx::shared_address(&memory.full[place.stage]), place.parity);
    load_weights(operands, ptx::shared_address(memory.stages[place.stage]), offset);
  };
  const auto multiply = [&](FewOperands& operands, FewOperands& next_operands, int step) {
    const int stage = place.stage;
    if constexpr (!std::is_same_v<T, __half>)
      ptx::barrier_wait(ptx::shared_address(&memory.converted[stage]), place.parity);
    const uint64_t tokens =
        matrix_descriptor(ptx::shared_address(memory.stages[stage]) + FewMemory<kColumns, kStages>::kWeightBytes);
    // Multiply
    float sums[kColumns / 2];
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < kInstructionsPerStep; ++i)
      WgmmaRegisters<__half, kColumns>::add(sums, operands.low[i], tokens + static_cast<uint64_t>(i) * kDescriptorStep,
                                            i > 0);
#pragma unroll
    for (int i = 0; i < kInstructionsPerStep; ++i)
      WgmmaRegisters<__half, kColumns>::add(sums, operands.high[i], tokens + static_cast<uint64_t>(i) * kDescriptorStep,
                                            1);
    ptx::wgmma_commit();
    for (int i = 0; i < kStride; ++i) place.advance();
    if constexpr (kLoadsAhead) {
      if (step + kStride < num_steps)
        load(next_operands);
    }
    ptx::wgmma_wait<0>();
#pragma unroll
    for (float& sum : sums) ptx::pin(sum);
    // Add
    finish(sums, operands.inverse_scales, stage, step);
    __syncwarp();
    if (lane == 0)
      ptx::barrier_arrive(ptx::shared_address(&memory.empty[stage]));
  };
  if constexpr (kLoadsAhead) {
    FewOperands even;
    FewOperands odd;
    if (first < num_steps)
      load(even);
#pragma unroll 1
    for (int step = first; step < num_steps; step += 2 * kStride) {
      multiply(even, odd, step);
      if (step + kStride < num_steps)
        multiply(odd, even, step + kStride);
    }
  } else {
#pragma unroll 1
    for (int step = first; step < num_steps; step += kStride) {
      FewOperands operands;
      load(operands);
      multiply(operands, operands, step);
    }
  }
}

/// totals += sums without their scales: `expert_scales` of the thread's two experts, `token_scales` of the columns.
template <int kSums>
__device__ __forceinline__ void add_few(float (&totals)[kSums], const float (&sums)[kSums],
                                        const float (&expert_scales)[2], const float* token_scales) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int j = 0; j < kSums / 4; ++j) {
    const float2 inverse = *reinterpret_cast<const float2*>(token_scales + token_of_sum(lane, j, 0));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int k = 4 * j + 2 * h;
      totals[k] = fmaf(sums[k] * expert_scales[h], inverse.x, totals[k]);
      totals[k + 1] = fmaf(sums[k + 1] * expert_scales[h], inverse.y, totals[k + 1]);
    }
  }
}

/// The second of two multipliers: hands its sums over.
template <typename T, int kColumns, int kStages>
__device__ __forceinline__ void hand_over_sums(int num_steps, FewMemory<kColumns, kStages>& memory) {
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  uint32_t parity = 1;
  multiply_few<T>(1, num_steps, memory,
                  [&](const float (&sums)[kColumns / 2], const float (&expert_scales)[2], int stage, int) {
                    ptx::barrier_wait(ptx::shared_address(&memory.taken), parity);
                    parity ^= 1U;
#pragma unroll
                    for (int k = 0; k < kColumns / 2; ++k)
                      memory.handed_sums[k][thread] = sums[k] * expert_scales[k / 2 % 2];
                    if (thread < kColumns)
                      memory.handed_scales[thread] = memory.inverse_scales[stage][thread];
                    __syncwarp();
                    if (thread % kWarpSize == 0)
                      ptx::barrier_arrive(ptx::shared_address(&memory.handed));
                  });
}

/// The first multiplier: totals = the sums of all of the group's `num_steps` stages, in their order.
template <typename T, int kColumns, int kStages>
__device__ __forceinline__ void add_all_stages(float (&totals)[kColumns / 2], int num_steps,
                                               FewMemory<kColumns, kStages>& memory) {
#pragma unroll
  for (float& total : totals) {
    total = 0.0F;
    ptx::pin(total);  // here, where there are registers for it
  }
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  uint32_t parity = 0;
  multiply_few<T>(0, num_steps, memory,
                  [&](const float (&sums)[kColumns / 2], const float (&expert_scales)[2], int stage, int step) {
                    add_few(totals, sums, expert_scales, memory.inverse_scales[stage]);
                    if constexpr (num_multipliers(kColumns) == 2) {
                      if (step + 1 == num_steps)
                        return;
                      ptx::barrier_wait(ptx::shared_address(&memory.handed), parity);
                      parity ^= 1U;
                      float handed[kColumns / 2];
#pragma unroll
                      for (int k = 0; k < kColumns / 2; ++k) handed[k] = memory.handed_sums[k][thread];
                      const float unscaled[2] = {1, 1};
                      add_few(totals, handed, unscaled, memory.handed_scales);
                      __syncwarp();
                      if (thread % kWarpSize == 0)
                        ptx::barrier_arrive(ptx::shared_address(&memory.taken));
                    }
                  });
}

/// The multipliers add the groups and write: each block a part of the tokens, 4 experts per thread and turn.
template <int kColumns>
__device__ __forceinline__ void add_groups_of_cluster(const FewArguments& arguments, const float* partial, int group,
                                                      int first_expert) {
  constexpr int kTokens = kColumns / kGroups;
  constexpr int kVectors = kFewExperts / 4;
  const bool stores_vectors = arguments.num_experts % 4 == 0;
  for (int i = static_cast<int>(threadIdx.x); i < kTokens * kVectors;
       i += num_multipliers(kColumns) * kWarpgroupThreads) {
    const int token = group * kTokens + i / kVectors;
    const int in_tile = i % kVectors * 4;
    const uint32_t address = ptx::shared_address(partial + token * kPartialStride + in_tile);
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
    float* const out = arguments.logits + int64_t{token} * arguments.num_experts + expert;
    if (stores_vectors) {
      *reinterpret_cast<float4*>(out) = make_float4(sums[0], sums[1], sums[2], sums[3]);
    } else {
      for (int k = 0; k < min(4, arguments.num_experts - expert); ++k) out[k] = sums[k];
    }
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <typename T, int kColumns, int kStages>
__global__ void __launch_bounds__(few_threads(kColumns), 1) few_tokens(const __grid_constant__ FewArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Memory = FewMemory<kColumns, kStages>;
  constexpr int kMultipliers = num_multipliers(kColumns);
  extern __shared__ uint8_t unaligned_memory[];
  Memory& memory = *reinterpret_cast<Memory*>(unaligned_memory + misalignment(unaligned_memory));
  const int group = static_cast<int>(ptx::cluster_rank());
  const int first_expert = static_cast<int>(blockIdx.x) / kGroups * kFewExperts;
  const int begin = first_step(group, arguments.num_steps);
  const int end = first_step(group + 1, arguments.num_steps);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(ptx::shared_address(&memory.full[stage]), 1);
      ptx::barrier_init(ptx::shared_address(&memory.converted[stage]), 4);
      ptx::barrier_init(ptx::shared_address(&memory.empty[stage]), 4);
    }
    ptx::barrier_init(ptx::shared_address(&memory.handed), 4);
    ptx::barrier_init(ptx::shared_address(&memory.taken), 4);
    ptx::fence_barrier_init();
  }
  if constexpr (std::is_same_v<T, __half>) {  // hidden states stay as they are
    for (int i = static_cast<int>(threadIdx.x); i < kStages * kColumns; i += few_threads(kColumns))
      memory.inverse_scales[i / kColumns][i % kColumns] = 1;
  }
  __syncthreads();

  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroupThreads;
  if (warpgroup < kMultipliers) {
    wait_for_previous_kernels();
    let_next_kernel_start();
    ptx::raise_registers<multiplier_registers(kColumns)>();
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    const int warp = static_cast<int>(threadIdx.x) / kWarpSize % 4;
    if (warpgroup == 0) {
      float totals[kColumns / 2];
      add_all_stages<T>(totals, end - begin, memory);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            memory.partial[token_of_sum(lane, j, i) * kPartialStride + expert_of_sum(warp, lane, h)] =
                totals[4 * j + 2 * h + i];
          }
        }
      }
    } else if constexpr (kMultipliers == 2) {
      hand_over_sums<T>(end - begin, memory);
    }
    ptx::cluster_sync();
    add_groups_of_cluster<kColumns>(arguments, memory.partial, group, first_expert);
  } else if (warpgroup == kMultipliers) {
    ptx::lower_registers<converter_registers(kColumns)>();
    wait_for_previous_kernels();
    if constexpr (!std::is_same_v<T, __half>)
      convert_tokens(memory, end - begin);
    ptx::cluster_sync();
  } else {
    ptx::lower_registers<kProducerRegisters>();
    if (threadIdx.x == (kMultipliers + 1) * kWarpgroupThreads)
      load_few(arguments, memory, first_expert, begin, end);
    else
      wait_for_previous_kernels();
    __syncwarp();
    ptx::cluster_sync();
  }
  ptx::cluster_meet();  // others may still read this block's sums
#else
  __trap();  // wgmma is in code for sm_90a alone, and the launcher asks whether that is there
#endif
}

}  // namespace zexpert::cuda::router
