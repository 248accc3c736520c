// SPDX-License-Identifier: Apache-2.0
// router_logits for some and many tokens on Hopper: see router_logits_layout.h.
//
// split_weights writes the weights' parts once per call. Then pairs of blocks multiply: a stage of the ring is 64
// elements of depth of both parts of 128 experts' weights and of a block's 128 tokens. Each block of a pair loads one
// part, into both. Each of two warpgroups has 64 tokens: it loads them into registers, scales them into float16, and
// multiplies with the weights in shared memory.
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

inline constexpr int kManyThreads = (kManyWarpgroups + 1) * kWarpgroupThreads;
inline constexpr int kConsumerRegisters = 240;
inline constexpr int kSplitThreads = 256;

struct SplitArguments {
  const float* weight;
  int64_t row_stride;
  int num_experts;
  int hidden_size;
  int num_steps;
  __half* parts;          ///< [kParts, num_experts, hidden_size]
  float* inverse_scales;  ///< [num_steps, expert tiles * kManyExperts]
  int* has_scales;        ///< [expert tiles, num_steps]: whether a scale of the tile's chunk is not the default
};

/// A block for a tile of experts and a chunk of depth. 16 lanes share an expert.
__global__ void __launch_bounds__(kSplitThreads) split_weights(const SplitArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int kLanes = kStepDepth / 4;
  constexpr int kRows = kSplitThreads / kLanes;
  constexpr int kTurns = kManyExperts / kRows;
  const int tile = static_cast<int>(blockIdx.x) / arguments.num_steps;
  const int step = static_cast<int>(blockIdx.x) % arguments.num_steps;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int first_expert = tile * kManyExperts + static_cast<int>(threadIdx.x) / kLanes;
  const int column = step * kStepDepth + lane * 4;
  const bool has_column = column < arguments.hidden_size;
  const int64_t padded_experts = int64_t{kManyExperts} * (gridDim.x / static_cast<unsigned>(arguments.num_steps));
  wait_for_previous_kernels();
  let_next_kernel_start();
  float4 weights[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int expert = first_expert + turn * kRows;
    weights[turn] = expert < arguments.num_experts && has_column
                        ? *reinterpret_cast<const float4*>(arguments.weight + expert * arguments.row_stride + column)
                        : make_float4(0, 0, 0, 0);
  }
  bool has_scales = false;
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    const int expert = first_expert + turn * kRows;
    const float4 own = weights[turn];
    float largest = fmaxf(fmaxf(fabsf(own.x), fabsf(own.y)), fmaxf(fabsf(own.z), fabsf(own.w)));
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      largest = fmaxf(largest, __shfl_xor_sync(kFullMask, largest, offset));
    const uint32_t scale = weight_scale(__float_as_uint(largest));
    has_scales = has_scales || scale != kDefaultWeightScale;
    if (lane == 0)
      arguments.inverse_scales[step * padded_experts + expert] = __uint_as_float(inverse_scale(scale));
    if (expert >= arguments.num_experts)
      continue;
    const SplitWeights one = split(make_float2(own.x, own.y), __uint_as_float(scale));
    const SplitWeights two = split(make_float2(own.z, own.w), __uint_as_float(scale));
    if (has_column) {
      __half* const out = arguments.parts + int64_t{expert} * arguments.hidden_size + column;
      *reinterpret_cast<uint2*>(out) = make_uint2(one.high, two.high);
      *reinterpret_cast<uint2*>(out + int64_t{arguments.num_experts} * arguments.hidden_size) =
          make_uint2(one.low, two.low);
    }
  }
  const int any = __syncthreads_or(has_scales ? 1 : 0);
  if (threadIdx.x == 0)
    arguments.has_scales[int64_t{tile} * arguments.num_steps + step] = any;
#else
  __trap();
#endif
}

struct ManyArguments {
  CUtensorMap parts;            ///< [kParts * num_experts, hidden_size], boxes of kStepDepth by kManyExperts
  CUtensorMap hidden_states;    ///< boxes of kStepDepth by kManyTokens
  const float* inverse_scales;  ///< as in SplitArguments
  const int* has_scales;        ///< as in SplitArguments
  float* out;                   ///< logits; if units have one group, partial sums [kGroups, num_tokens, num_experts]
  int64_t num_tokens;
  int num_experts;
  int num_steps;
  Units units;
};

template <int kStages>
struct ManyMemory {
  static constexpr int kPartBytes = kManyExperts * kLineBytes;
  static constexpr int kWeightBytes = kParts * kPartBytes;
  static constexpr int kStageBytes = kWeightBytes + kManyTokens * kLineBytes;

  alignas(kSwizzleBytes) uint8_t stages[kStages][kStageBytes];  // high and low parts, then the hidden states
  uint64_t full[kStages];
  uint64_t empty[kStages];
};

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

/// One thread. Both blocks of a pair have the same experts, so each loads one part of the weights, into both.
template <int kStages>
__device__ __forceinline__ void load_units(const ManyArguments& arguments, ManyMemory<kStages>& memory) {
  using Memory = ManyMemory<kStages>;
  constexpr auto kBothBlocks = static_cast<uint16_t>((1U << kPair) - 1U);
  const auto part = static_cast<int>(ptx::cluster_rank());
  const uint64_t policy = ptx::evict_normal();
  Place<kStages> place;
  for_each_unit(arguments.units, [&](const Unit& unit) {
    const int end = first_step(unit.last_group, arguments.num_steps);
    for (int step = first_step(unit.first_group, arguments.num_steps); step < end; ++step) {
      const uint32_t full = ptx::shared_address(&memory.full[place.stage]);
      const uint32_t stage = ptx::shared_address(memory.stages[place.stage]);
      ptx::barrier_wait(ptx::shared_address(&memory.empty[place.stage]), place.parity ^ 1U);
      ptx::barrier_arrive_and_expect(full, Memory::kStageBytes);
      ptx::load_box_2d_into_blocks(stage + static_cast<uint32_t>(part * Memory::kPartBytes), arguments.parts, full,
                                   kBothBlocks, step * kStepDepth,
                                   part * arguments.num_experts + unit.expert_tile * kManyExperts);
      ptx::load_box_2d(stage + Memory::kWeightBytes, arguments.hidden_states, full, policy, step * kStepDepth,
                       first_token(unit));
      place.advance();
    }
  });
}

__device__ __forceinline__ void load_matrices(uint32_t (&operand)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared::cta.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(operand[0]), "=r"(operand[1]), "=r"(operand[2]), "=r"(operand[3])
               : "r"(address)
               : "memory");
}

/// A chunk of a thread's two tokens.
template <typename T>
struct TokenOperand {
  uint32_t pairs[kInstructionsPerStep][4];
  float inverse_scales[2];

  /// `address` is that of the warp's first line, `offset` token_offset(lane, 0).
  __device__ __forceinline__ void load(uint32_t address, uint32_t offset) {
#pragma unroll
    for (int i = 0; i < kInstructionsPerStep; ++i)  // a step of 2 chunks of 16 bytes within the line
      load_matrices(pairs[i], address + (offset ^ static_cast<uint32_t>(i * 32)));
    inverse_scales[0] = inverse_scales[1] = 1;
    if constexpr (!std::is_same_v<T, __half>) {
      // Scale: 4 lanes share a token. Tokens h = 0 and 1 end up in one register.
      uint32_t largest[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        uint32_t of_instructions[kInstructionsPerStep];
#pragma unroll
        for (int i = 0; i < kInstructionsPerStep; ++i) of_instructions[i] = larger(pairs[i][h], pairs[i][2 + h]);
        static_assert(kInstructionsPerStep == 4);
        largest[h] =
            larger(larger(of_instructions[0], of_instructions[1]), larger(of_instructions[2], of_instructions[3]));
      }
      uint32_t both = larger(__byte_perm(largest[0], largest[1], 0x5410), __byte_perm(largest[0], largest[1], 0x7632));
      both = larger(both, __shfl_xor_sync(kFullMask, both, 1));
      both = larger(both, __shfl_xor_sync(kFullMask, both, 2));
      const uint32_t scales[2] = {token_scale(both << 16U), token_scale(both & 0xffff0000U)};
#pragma unroll
      for (int h = 0; h < 2; ++h) inverse_scales[h] = __uint_as_float(inverse_scale(scales[h]));
#pragma unroll
      for (int i = 0; i < kInstructionsPerStep; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) pairs[i][k] = scaled_tokens(pairs[i][k], __uint_as_float(scales[k % 2]));
      }
    }
  }
};

/// Writes a thread's sums. `token` and `expert` are those of its first.
__device__ __forceinline__ void write_sums(const float (&sums)[kManyExperts / 2], float* out, int64_t token, int expert,
                                           int num_experts, int64_t num_tokens) {
  const int64_t row_stride = num_experts;
  const bool stores_pairs = num_experts % 2 == 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (token + 8 * h >= num_tokens)
      continue;
    float* const row = out + (token + 8 * h) * row_stride;
#pragma unroll
    for (int j = 0; j < kManyExperts / 8; ++j) {
      const int column = expert + 8 * j;
      const float first = sums[4 * j + 2 * h];
      const float second = sums[4 * j + 2 * h + 1];
      if (stores_pairs) {
        if (column < num_experts)
          *reinterpret_cast<float2*>(row + column) = make_float2(first, second);
      } else {
        if (column < num_experts)
          row[column] = first;
        if (column + 1 < num_experts)
          row[column + 1] = second;
      }
    }
  }
}

/// sums = the products of a stage: all low parts, then the high ones. Started, not waited for.
template <int kSums>
__device__ __forceinline__ void start_products(float (&sums)[kSums], const uint32_t (&pairs)[kInstructionsPerStep][4],
                                               uint32_t stage) {
  const uint64_t high = matrix_descriptor(stage);
  const uint64_t low = matrix_descriptor(stage + kManyExperts * kLineBytes);
  ptx::wgmma_fence();
#pragma unroll
  for (int i = 0; i < kInstructionsPerStep; ++i) {
    WgmmaRegisters<__half, kManyExperts>::add(sums, pairs[i], low + static_cast<uint64_t>(i) * kDescriptorStep, i > 0);
  }
#pragma unroll
  for (int i = 0; i < kInstructionsPerStep; ++i)
    WgmmaRegisters<__half, kManyExperts>::add(sums, pairs[i], high + static_cast<uint64_t>(i) * kDescriptorStep, 1);
  ptx::wgmma_commit();
}

/// group_sums += sums, without their scales. `scales` is that of the thread's first expert; null for the default.
template <int kSums>
__device__ __forceinline__ void add_products(float (&group_sums)[kSums], float (&sums)[kSums],
                                             const float (&inverse_scales)[2], const float* scales) {
  constexpr float kDefaultInverse = 1.0F / 4096;
  static_assert(kDefaultWeightScale == (127U + 12U) << kExponentShift);
  float factors[2] = {inverse_scales[0], inverse_scales[1]};
  if (scales != nullptr) {
#pragma unroll
    for (int j = 0; j < kSums / 4; ++j) {
      const float2 own = __ldcg(reinterpret_cast<const float2*>(scales + 8 * j));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sums[4 * j + 2 * h] *= own.x;
        sums[4 * j + 2 * h + 1] *= own.y;
      }
    }
  } else {
    factors[0] *= kDefaultInverse;
    factors[1] *= kDefaultInverse;
  }
#pragma unroll
  for (int i = 0; i < kSums; ++i) group_sums[i] = fmaf(sums[i], factors[i / 2 % 2], group_sums[i]);
}

/// A warpgroup's part of all units.
template <typename T, int kStages>
__device__ __forceinline__ void multiply_units(const ManyArguments& arguments, ManyMemory<kStages>& memory) {
  constexpr int kSums = kManyExperts / 2;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;  // of both warpgroups: 16 tokens each
  const uint32_t warp_lines = ManyMemory<kStages>::kWeightBytes + static_cast<uint32_t>(16 * warp * kLineBytes);
  const uint32_t offset = token_offset(lane, 0);
  const int64_t padded_experts = int64_t{kManyExperts} * arguments.units.num_expert_tiles;
  Place<kStages> place;
  for_each_unit(arguments.units, [&](const Unit& unit) {
    const int* const has_scales = arguments.has_scales + int64_t{unit.expert_tile} * arguments.num_steps;
    const int first_expert = unit.expert_tile * kManyExperts + expert_of_column(lane, 0, 0);
    float totals[kSums] = {};
#pragma unroll 1
    for (int group = unit.first_group; group < unit.last_group; ++group) {
      float group_sums[kSums] = {};
      const int end = first_step(group + 1, arguments.num_steps);
#pragma unroll 1
      for (int step = first_step(group, arguments.num_steps); step < end; ++step) {
        ptx::barrier_wait(ptx::shared_address(&memory.full[place.stage]), place.parity);
        const uint32_t stage = ptx::shared_address(memory.stages[place.stage]);
        const int is_scaled = __ldcg(has_scales + step);
        TokenOperand<T> operand;
        operand.load(stage + warp_lines, offset);
        float sums[kSums];
        start_products(sums, operand.pairs, stage);
        ptx::wgmma_wait<0>();
#pragma unroll
        for (float& sum : sums) ptx::pin(sum);
        if (lane < kPair)
          ptx::barrier_arrive_in_cluster(ptx::address_in_block(ptx::shared_address(&memory.empty[place.stage]), lane));
        place.advance();
        add_products(group_sums, sums, operand.inverse_scales,
                     is_scaled != 0 ? arguments.inverse_scales + step * padded_experts + first_expert : nullptr);
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) totals[i] += group_sums[i];
    }
    float* const out = arguments.out + unit.first_group * arguments.num_tokens * arguments.num_experts;
    write_sums(totals, out, first_token(unit) + token_of_row(warp, lane, 0), first_expert, arguments.num_experts,
               arguments.num_tokens);
  });
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

/// Pairs of blocks work off the units in turn.
template <typename T, int kStages>
__global__ void __launch_bounds__(kManyThreads, 1) many_tokens(const __grid_constant__ ManyArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Memory = ManyMemory<kStages>;
  extern __shared__ uint8_t unaligned_memory[];
  Memory& memory = *reinterpret_cast<Memory*>(unaligned_memory + misalignment(unaligned_memory));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(ptx::shared_address(&memory.full[stage]), 1);
      ptx::barrier_init(ptx::shared_address(&memory.empty[stage]), kPair * kManyWarpgroups * 4);
    }
    ptx::fence_barrier_init();
  }
  ptx::cluster_meet();  // before anything comes from the other block

  if (threadIdx.x < kManyWarpgroups * kWarpgroupThreads) {
    wait_for_previous_kernels();
    let_next_kernel_start();
    ptx::raise_registers<kConsumerRegisters>();
    multiply_units<T>(arguments, memory);
  } else {
    ptx::lower_registers<kProducerRegisters>();
    if (threadIdx.x == kManyWarpgroups * kWarpgroupThreads) {
      ptx::prefetch_tensor_map(arguments.parts);
      ptx::prefetch_tensor_map(arguments.hidden_states);
      wait_for_previous_kernels();
      load_units(arguments, memory);
    } else {
      wait_for_previous_kernels();
    }
  }
  __syncwarp();
  ptx::cluster_meet();  // the other block may still load into this one's memory, or arrive at its barriers
#else
  __trap();
#endif
}

}  // namespace zexpert::cuda::router
