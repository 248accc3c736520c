// SPDX-License-Identifier: Apache-2.0
// What the routing kernels share: arguments, loads, scores.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/element_types.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "zexpert/enums.h"
#include "zexpert/scalar_types.h"

namespace zexpert::cuda {

/// What a kernel routes, and how: every count known, sizes that fit made int.
struct RoutingArguments {
  const void* logits;
  int64_t logits_row_stride;
  const void* bias;  // null: none
  int64_t num_tokens;
  int num_experts;
  int top_k;
  int num_real_experts;
  int first_constant;  // identity experts end here
  int first_drop;      // constant experts end here
  int num_expert_group;
  int topk_group;
  float routed_scaling_factor;
  ScalarType logits_type;
  ScalarType bias_type;
  ScoringFunc scoring_func;
  bool logits_fit_vectors;  // every row has the alignment of the widest load
  bool bias_fits_vectors;   // float32, and aligned likewise
  bool renormalize;
  bool drop_before_renormalize;
};

// Loads

/// Calls `fn` with a typed pointer to data of any floating type.
template <typename Fn>
__device__ __forceinline__ auto visit_floating_pointer(const void* data, ScalarType type, Fn&& fn) {
  switch (type) {
    case ScalarType::kFloat64: return fn(static_cast<const double*>(data));
    case ScalarType::kBFloat16: return fn(static_cast<const __nv_bfloat16*>(data));
    case ScalarType::kFloat16: return fn(static_cast<const __half*>(data));
    default: return fn(static_cast<const float*>(data));
  }
}

__device__ __forceinline__ float load_as_float(const void* data, ScalarType type, int64_t index) {
  return visit_floating_pointer(data, type, [index](const auto* typed) { return to_float(typed[index]); });
}

template <int kVector, typename T>
__device__ __forceinline__ void load_vector(const T* source, float (&values)[kVector]) {
  const Vector<T, kVector> vector = *reinterpret_cast<const Vector<T, kVector>*>(source);
#pragma unroll
  for (int v = 0; v < kVector; ++v) values[v] = to_float(vector.values[v]);
}

// Scores. The intrinsics with a rounding mode are never fused, so that a score is the same bits wherever it is
// computed.

__device__ __forceinline__ bool is_finite(float value) { return fabsf(value) < INFINITY; }

/// 2^x to within 2 units in the last place; 0 below the normal numbers.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

inline constexpr float kLog2E = 1.44269504088896341F;

/// exp(logit - largest), before the division by the row's sum. The careful form is right for every logit, and to within
/// a unit in the last place. The other is fast, right for logits of ordinary size, and has a factor that all terms of
/// the row share: the rounding of largest * log2(e).
template <bool kCareful>
__device__ __forceinline__ float softmax_term(float logit, float largest) {
  if (kCareful)
    return expf(__fadd_rn(logit, -largest));
  return exp2_approx(__fmaf_rn(logit, kLog2E, __fmul_rn(largest, -kLog2E)));
}

/// 1 / x to within a unit in the last place, for x within the normal numbers.
__device__ __forceinline__ float reciprocal(float x) {
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(x));
  return __fmaf_rn(estimate, __fmaf_rn(-x, estimate, 1.0F), estimate);
}

__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0F, __fadd_rn(1.0F, expf(-x))); }

/// sqrt(log(1 + exp(x))), stable at both ends.
__device__ __forceinline__ float sqrt_softplus(float x) {
  const float softplus = __fadd_rn(fmaxf(x, 0.0F), log1pf(expf(-fabsf(x))));
  float root;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(softplus));
  // Far below 0 the softplus is exp(x) to within rounding, but underflows long before its root does.
  constexpr float kExponential = -17.0F;
  return x < kExponential ? expf(0.5F * x) : root;
}

/// What the scores of one row depend on beside the logit.
struct RowScale {
  float largest;  // softmax: the largest logit
  float inverse;  // softmax: 1 / sum of the terms
};

template <bool kCareful>
__device__ __forceinline__ float score_of(ScoringFunc scoring_func, float logit, RowScale row) {
  if (scoring_func == ScoringFunc::kSoftmax) {
    return __fmul_rn(softmax_term<kCareful>(logit, row.largest), row.inverse);
  }
  return scoring_func == ScoringFunc::kSigmoid ? sigmoid(logit) : sqrt_softplus(logit);
}

// Selection

/// Bits that compare as unsigned integers like the floats they come from; every float's are above 0, which stands for
/// NaN.
__device__ __forceinline__ unsigned ordered_bits(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned ordered = (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
  return isnan(value) ? 0U : ordered;
}

__device__ __forceinline__ float from_ordered_bits(unsigned ordered) {
  return __uint_as_float((ordered & 0x80000000U) != 0 ? ordered & 0x7fffffffU : ~ordered);
}

/// Compares as the order of choice: larger key first, then lower index. 0 for a NaN key, and below all others.
__device__ __forceinline__ uint64_t choice_word(unsigned key_bits, unsigned index) {
  return key_bits == 0 ? 0 : (static_cast<uint64_t>(key_bits) << 32) | ~index;
}
__device__ __forceinline__ int index_of(uint64_t word) { return static_cast<int>(~static_cast<unsigned>(word)); }

/// The score of a group from the ordered bits of its two largest keys, 0 for none: their sum, the one where there is
/// but one, -inf where there is none or the sum is NaN.
__device__ __forceinline__ float group_score(unsigned first, unsigned second) {
  if (first == 0)
    return -INFINITY;
  const float score = second == 0 ? from_ordered_bits(first) : from_ordered_bits(first) + from_ordered_bits(second);
  return isnan(score) ? -INFINITY : score;
}

/// Whether fewer than topk_group groups come before `group`.
__device__ __forceinline__ bool is_best_group(const float* group_scores, int group, const RoutingArguments& arguments) {
  int num_better = 0;
  for (int other = 0; other < arguments.num_expert_group; ++other) {
    const bool comes_first = group_scores[other] == group_scores[group] && other < group;
    num_better += group_scores[other] > group_scores[group] || comes_first ? 1 : 0;
  }
  return num_better < arguments.topk_group;
}

// Across a warp

__device__ __forceinline__ float warp_max(float value) {
  return from_ordered_bits(__reduce_max_sync(kFullMask, ordered_bits(value)));
}

/// One slot of a token's row as a lane holds it.
struct Slot {
  int index;   // top_k or more: none
  int expert;  // among all experts; -1: nothing was left to choose
  float score;

  __device__ bool is_of_row(const RoutingArguments& arguments) const { return index < arguments.top_k; }
  /// The score as the row's weights are made of it.
  __device__ float weight(const RoutingArguments& arguments) const {
    const bool counts =
        is_of_row(arguments) && expert >= 0 && !(arguments.drop_before_renormalize && expert >= arguments.first_drop);
    return counts ? score : 0.0F;
  }
};

}  // namespace zexpert::cuda
