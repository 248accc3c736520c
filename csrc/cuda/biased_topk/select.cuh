// SPDX-License-Identifier: Apache-2.0
// Selection among keys in the registers of a warp, for warp.cuh.
#pragma once

#include <cstdint>

#include "cuda/biased_topk/common.cuh"

namespace zexpert::cuda {

inline constexpr int kMaxCandidates = kWarpSize;

/// A warp's shared memory: a key and an expert for each candidate. The address is a number, because the compiler would
/// recompute a C++ pointer to shared memory at every use.
class WarpScratch {
 public:
  static constexpr int kBytes = kMaxCandidates * 8;

  /// `memory` is shared memory of kBytes, aligned to 16 bytes.
  __device__ explicit WarpScratch(const void* memory)
      : address_(static_cast<unsigned>(__cvta_generic_to_shared(memory))) {
    asm volatile("" : "+r"(address_));  // hide the address from the compiler so that it stays in a register
  }
  __device__ void set_key(int i, float key) const {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address_ + 4 * i), "f"(key) : "memory");
  }
  __device__ float key(int i) const {
    float key;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(key) : "r"(address_ + 4 * i) : "memory");
    return key;
  }
  /// Keys 4 * i to 4 * i + 3.
  __device__ float4 four_keys(int i) const {
    float4 keys;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(keys.x), "=f"(keys.y), "=f"(keys.z), "=f"(keys.w)
                 : "r"(address_ + 16 * i)
                 : "memory");
    return keys;
  }
  __device__ void set_expert(int i, int expert) const {
    asm volatile("st.shared.s32 [%0+128], %1;" ::"r"(address_ + 4 * i), "r"(expert) : "memory");
  }
  __device__ int expert(int i) const {
    int expert;
    asm volatile("ld.shared.s32 %0, [%1+128];" : "=r"(expert) : "r"(address_ + 4 * i) : "memory");
    return expert;
  }

 private:
  unsigned address_;
};

/// Which of two values the lane keeps in each step of warp_sort_descending: 6 bits for each size of sorted runs. Bit
/// log2(stride) of them is 0 if the lane keeps the larger value.
__device__ __forceinline__ unsigned sort_directions(int lane) {
  const auto i = static_cast<unsigned>(lane);
  constexpr unsigned kFiveRuns = 1U | 1U << 6 | 1U << 12 | 1U << 18 | 1U << 24;
  // Every other run of a size is sorted in ascending order: the lane's bit for the size flips the bits for its strides.
  unsigned directions = i * kFiveRuns;
  directions ^= (i & 16U) * (31U << 6 >> 4) + (i & 8U) * (31U << 12 >> 3) + (i & 4U) * (31U << 18 >> 2) +
                (i & 2U) * (31U << 24 >> 1);
  asm volatile("" : "+r"(directions));  // keeps the compiler from deriving each bit separately
  return directions;
}

/// Descending bitonic sort across the warp; lane k gets the k-th largest.
__device__ __forceinline__ float warp_sort_descending(float value, int lane) {
  const unsigned directions = sort_directions(lane);
  int first_bit = 24;
#pragma unroll
  for (int size = 2; size <= kWarpSize; size *= 2, first_bit -= 6) {
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
      const float other = __shfl_xor_sync(kFullMask, value, stride);
      const bool keeps_larger = (directions & (static_cast<unsigned>(stride) << first_bit)) == 0;
      value = (other > value) == keeps_larger ? other : value;
    }
  }
  return value;
}

/// Makes the keys NaN of real experts in a group that is not among the best topk_group. `row_keys` is the warp's shared
/// memory: the row's keys, then a score for each group.
template <typename Layout>
__device__ __forceinline__ void mask_groups(const RoutingArguments& arguments, int lane, float* row_keys,
                                            float (&keys)[Layout::kPerLane]) {
  const int group_size = arguments.num_real_experts / arguments.num_expert_group;
  float* group_scores = row_keys + arguments.num_experts;
#pragma unroll
  for (int i = 0; i < Layout::kPerLane; ++i) {
    const int expert = Layout::expert(lane, i);
    if (expert < arguments.num_real_experts)
      row_keys[expert] = keys[i];
  }
  __syncwarp();
  for (int group = 0; group < arguments.num_expert_group; ++group) {
    // Ordered bits of the two largest keys that can be chosen; 0: none.
    unsigned first = 0;
    unsigned second = 0;
    for (int i = lane; i < group_size; i += kWarpSize) {
      const unsigned bits = ordered_bits(row_keys[group * group_size + i]);
      second = max(second, min(first, bits));
      first = max(first, bits);
    }
    const unsigned best = __reduce_max_sync(kFullMask, first);
    const int holder = __ffs(static_cast<int>(__ballot_sync(kFullMask, first == best))) - 1;
    const unsigned next = __reduce_max_sync(kFullMask, lane == holder ? second : first);
    if (lane == 0)
      group_scores[group] = group_score(best, next);
  }
  __syncwarp();
#pragma unroll 1
  for (int group = lane; group < arguments.num_expert_group; group += kWarpSize) {
    if (!is_best_group(group_scores, group, arguments)) {
      for (int i = 0; i < group_size; ++i) row_keys[group * group_size + i] = NAN;
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < Layout::kPerLane; ++i) {
    const int expert = Layout::expert(lane, i);
    if (expert < arguments.num_real_experts)
      keys[i] = row_keys[expert];
  }
  __syncwarp();  // the next token's keys overwrite these
}

/// Chooses in top_k rounds; in each, every lane offers its best key that is not yet taken. Lane k gets the k-th choice,
/// -1 if there is none.
template <typename Layout>
__device__ __forceinline__ int choose_in_rounds(int top_k, int lane, const float (&keys)[Layout::kPerLane]) {
  unsigned bits[Layout::kPerLane];
#pragma unroll
  for (int i = 0; i < Layout::kPerLane; ++i) bits[i] = ordered_bits(keys[i]);
  int chosen = -1;
#pragma unroll 1
  for (int k = 0; k < top_k; ++k) {
    unsigned best_bits = 0;
    int best = 0;
#pragma unroll
    for (int i = 0; i < Layout::kPerLane; ++i) {
      if (bits[i] > best_bits) {
        best_bits = bits[i];
        best = i;
      }
    }
    const unsigned winner_bits = __reduce_max_sync(kFullMask, best_bits);
    const unsigned expert = static_cast<unsigned>(Layout::expert(lane, best));
    const unsigned winner = __reduce_min_sync(kFullMask, best_bits == winner_bits ? expert : ~0U);
    if (winner_bits == 0)
      break;
    if (lane == k)
      chosen = static_cast<int>(winner);
#pragma unroll
    for (int i = 0; i < Layout::kPerLane; ++i) {
      if (winner == expert && i == best)
        bits[i] = 0;
    }
  }
  return chosen;
}

/// Sum of `value` over this lane and the lanes before it.
__device__ __forceinline__ int warp_inclusive_sum(int value) {
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    asm volatile(
        "{\n"
        "  .reg .s32 before;\n"
        "  .reg .pred exists;\n"
        "  shfl.sync.up.b32 before|exists, %0, %1, 0, 0xffffffff;\n"
        "  @exists add.s32 %0, %0, before;\n"
        "}"
        : "+r"(value)
        : "r"(offset));
  }
  return value;
}

/// Distributes the warp's candidates, at most 32: bit i of `reached` is set if the lane's element i is one, and
/// `num_before` candidates are in lanes before it. Lane c gets the c-th candidate, -1 if there is none.
template <typename Layout>
__device__ __forceinline__ int take_candidate(unsigned reached, int num_before, int num_candidates, int lane,
                                              WarpScratch scratch) {
  while (reached != 0) {
    const int element = kWarpSize - 1 - __clz(static_cast<int>(reached));
    scratch.set_expert(num_before++, element * kWarpSize + lane);
    reached ^= 1U << element;
  }
  __syncwarp();
  const int place = scratch.expert(lane);
  return lane < num_candidates ? Layout::expert_of_place(static_cast<unsigned>(place)) : -1;
}

/// Shifts in a bit: 1 if a < b, 0 if one of them is NaN or both are the same infinity.
__device__ __forceinline__ unsigned push_less(unsigned bits, float a, float b) {
  return __funnelshift_l(__float_as_uint(__fadd_rn(a, -b)), bits, 1);
}

/// How many candidates come before the lane's own: larger key, or equal key and lower expert. A lane without a
/// candidate passes NaN as its key.
__device__ __forceinline__ int rank_candidate(float key, int expert, int num_candidates, int lane,
                                              WarpScratch scratch) {
  scratch.set_key(lane, key);
  __syncwarp();
  unsigned larger = 0;
  const auto compare_half = [&](int half) {
#pragma unroll
    for (int i = 0; i < kMaxCandidates / 8; ++i) {
      const float4 others = scratch.four_keys(half * kMaxCandidates / 8 + i);
      larger = push_less(larger, key, others.x);
      larger = push_less(larger, key, others.y);
      larger = push_less(larger, key, others.z);
      larger = push_less(larger, key, others.w);
    }
  };
  compare_half(0);
  if (num_candidates > kMaxCandidates / 2)
    compare_half(1);
  int rank = __popc(larger);
  // Equal keys have the same rank, so that another rank is not taken.
  const unsigned ranks = __reduce_or_sync(kFullMask, lane < num_candidates ? 1U << rank : 0U);
  if (__builtin_expect(__popc(ranks) != num_candidates, 0)) {
    scratch.set_expert(lane, expert);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < num_candidates; ++i) {
      if (scratch.key(i) == key && scratch.expert(i) < expert)
        ++rank;
    }
  }
  return rank;
}

}  // namespace zexpert::cuda
