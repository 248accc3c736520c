// SPDX-License-Identifier: Apache-2.0
// The routing kernel for shapes that do not fit a warp: a block per token, the row's keys in shared memory. Experts are
// chosen in K rounds; in each, every thread offers its best key that is not yet taken.
#pragma once

#include <cstdint>

#include "cuda/biased_topk/common.cuh"
#include "cuda/biased_topk/outputs.cuh"

namespace zexpert::cuda {

inline constexpr int kBlockThreads = 256;
inline constexpr int kBlockWarps = kBlockThreads / kWarpSize;
inline constexpr int64_t kMaxBlockTopK = 64;

/// combine() of every thread's value, in every thread. The order is the same in every run.
template <typename T, typename Combine>
__device__ __forceinline__ T block_reduce(T value, T* scratch, const Combine& combine) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  __syncthreads();  // threads may still read the scratch of the previous reduction
  if (threadIdx.x % kWarpSize == 0)
    scratch[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  value = scratch[0];
#pragma unroll
  for (int warp = 1; warp < kBlockWarps; ++warp) value = combine(value, scratch[warp]);
  return value;
}

/// Makes the key bits 0 of real experts in a group that is not among the best topk_group.
__device__ inline void mask_groups_of_block(const RoutingArguments& arguments, unsigned* key_bits,
                                            float* group_scores) {
  const int thread = static_cast<int>(threadIdx.x);
  const int group_size = arguments.num_real_experts / arguments.num_expert_group;
  for (int group = thread; group < arguments.num_expert_group; group += kBlockThreads) {
    unsigned first = 0;
    unsigned second = 0;
    for (int i = 0; i < group_size; ++i) {
      const unsigned bits = key_bits[group * group_size + i];
      second = max(second, min(first, bits));
      first = max(first, bits);
    }
    group_scores[group] = group_score(first, second);
  }
  __syncthreads();
  for (int expert = thread; expert < arguments.num_real_experts; expert += kBlockThreads) {
    if (!is_best_group(group_scores, expert / group_size, arguments))
      key_bits[expert] = 0;
  }
  __syncthreads();
}

/// The expert given for a slot, -1 if an earlier slot has it too.
__device__ __forceinline__ int given_expert_of_block(const RoutingArguments& arguments, int64_t token, int slot) {
  const int expert = given_expert(arguments, token, slot);
  for (int earlier = 0; earlier < slot && earlier < arguments.top_k; ++earlier) {
    if (given_expert(arguments, token, earlier) == expert)
      return -1;
  }
  return expert;
}

/// Slots of a token that each lane of the first warp holds.
inline constexpr int kSlotsPerLane = kMaxBlockTopK / kWarpSize;

template <typename Logit>
__device__ __forceinline__ void finish_token_of_block(const RoutingArguments& arguments, const RoutingOutputs& outputs,
                                                      int64_t token, const Slot (&slots)[kSlotsPerLane], RowScale,
                                                      float*) {
  const int thread = static_cast<int>(threadIdx.x);
  if (thread < kWarpSize)
    write_routing(arguments, outputs, token, thread, slots);
}

template <typename Logit>
__device__ __forceinline__ void finish_token_of_block(const RoutingArguments& arguments,
                                                      const RoutingGradients& gradients, int64_t token,
                                                      const Slot (&slots)[kSlotsPerLane], RowScale scale,
                                                      float* scratch) {
  const int thread = static_cast<int>(threadIdx.x);
  float slot_gradient[kSlotsPerLane];
  if (thread < kWarpSize) {
    const float sum = slot_gradients(arguments, gradients, token, slots, slot_gradient);
    if (thread == 0)
      scratch[0] = sum;
  }
  __syncthreads();
  const float sum = scratch[0];
  const Logit* row = static_cast<const Logit*>(arguments.logits) + token * arguments.logits_row_stride;
  Logit* grad_row = static_cast<Logit*>(gradients.logits) + token * arguments.num_experts;
  for (int expert = thread; expert < arguments.num_experts; expert += kBlockThreads) {
    const float gradient = sum == 0.0F ? 0.0F : spread_gradient<true>(sum, to_float(row[expert]), scale);
    grad_row[expert] = Computed<Logit>::to(gradient);
  }
  __syncthreads();
  if (thread < kWarpSize)
    write_slot_gradients(arguments, slots, slot_gradient, grad_row);
}

/// Dynamic shared memory: key bits [num_experts], group scores [num_expert_group].
template <typename Logit, typename Outputs>
__global__ void __launch_bounds__(kBlockThreads)
    biased_topk_block(const RoutingArguments arguments, const Outputs outputs) {
  extern __shared__ unsigned row_memory[];
  __shared__ uint64_t word_scratch[kBlockWarps];
  __shared__ float float_scratch[kBlockWarps];
  __shared__ double double_scratch[kBlockWarps];
  __shared__ uint64_t chosen[kMaxBlockTopK];
  wait_for_previous_kernels();
  let_next_kernel_start();

  const int thread = static_cast<int>(threadIdx.x);
  const int num_experts = arguments.num_experts;
  const ScoringFunc scoring_func = arguments.scoring_func;
  const bool has_choices = arguments.choices != nullptr;
  unsigned* const key_bits = row_memory;
  auto* group_scores = reinterpret_cast<float*>(row_memory + num_experts);

  for (int64_t token = blockIdx.x; token < arguments.num_tokens; token += gridDim.x) {
    const Logit* row = static_cast<const Logit*>(arguments.logits) + token * arguments.logits_row_stride;

    // Scores
    RowScale scale{0.0F, 1.0F};
    visit_scoring_func(scoring_func, [&](auto scoring) {
      using Scoring = decltype(scoring);
      if constexpr (Scoring::kIsSoftmax) {
        float largest = -INFINITY;
        for (int expert = thread; expert < num_experts; expert += kBlockThreads) {
          const float logit = to_float(row[expert]);
          if (is_finite(logit))
            largest = fmaxf(largest, logit);
        }
        scale.largest = block_reduce(largest, float_scratch, [](float a, float b) { return fmaxf(a, b); });
        // float64, because the rounding errors of many equal terms add up.
        double sum = 0.0;
        for (int expert = thread; expert < num_experts; expert += kBlockThreads) {
          const float logit = to_float(row[expert]);
          if (is_finite(logit))
            sum += static_cast<double>(Scoring::template term<true>(logit, scale.largest));
        }
        sum = block_reduce(sum, double_scratch, [](double a, double b) { return a + b; });
        scale.inverse = static_cast<float>(1.0 / sum);
      }
    });

    // Keys
    for (int expert = thread; !has_choices && expert < num_experts; expert += kBlockThreads) {
      const float logit = to_float(row[expert]);
      float key = is_finite(logit) ? score_of<true>(scoring_func, logit, scale) : NAN;
      if (arguments.bias != nullptr) {
        key = __fadd_rn(key, load_as_float(arguments.bias, arguments.bias_type, expert));
      }
      key_bits[expert] = ordered_bits(key);
    }
    __syncthreads();
    if (!has_choices && arguments.topk_group < arguments.num_expert_group)
      mask_groups_of_block(arguments, key_bits, group_scores);

    // Choice
    uint64_t best = 0;
    bool is_stale = true;
    for (int k = 0; !has_choices && k < arguments.top_k; ++k) {
      if (is_stale) {
        best = 0;
        for (int expert = thread; expert < num_experts; expert += kBlockThreads) {
          const uint64_t word = choice_word(key_bits[expert], static_cast<unsigned>(expert));
          best = word > best ? word : best;
        }
      }
      const uint64_t winner = block_reduce(best, word_scratch, [](uint64_t a, uint64_t b) { return a > b ? a : b; });
      is_stale = winner != 0 && winner == best;
      if (is_stale)
        key_bits[index_of(winner)] = 0;
      if (thread == 0)
        chosen[k] = winner;
    }
    __syncthreads();

    // Write
    Slot slots[kSlotsPerLane];
#pragma unroll
    for (int s = 0; s < kSlotsPerLane; ++s) {
      slots[s] = {s * kWarpSize + thread, -1, 0.0F};
      if (has_choices) {
        slots[s].expert = given_expert_of_block(arguments, token, slots[s].index);
        if (slots[s].expert >= 0 && !is_finite(to_float(row[slots[s].expert])))
          slots[s].expert = -1;
      } else {
        const uint64_t word = slots[s].is_of_row(arguments) ? chosen[slots[s].index] : 0;
        slots[s].expert = word != 0 ? index_of(word) : -1;
      }
      if (slots[s].expert >= 0) {
        slots[s].score = score_of<true>(scoring_func, to_float(row[slots[s].expert]), scale);
      }
    }
    finish_token_of_block<Logit>(arguments, outputs, token, slots, scale, float_scratch);
    __syncthreads();  // the next token overwrites keys and choices
  }
}

}  // namespace zexpert::cuda
