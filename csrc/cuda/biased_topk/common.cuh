// SPDX-License-Identifier: Apache-2.0
// What the routing kernels share: arguments, loads, scores, the order of keys.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/types.cuh"
#include "cuda/vector.cuh"
#include "zexpert/enums.h"
#include "zexpert/scalar_types.h"

namespace zexpert::cuda {

/// RoutingInputs in the form of the kernels.
struct RoutingArguments {
  const void* logits;
  int64_t logits_row_stride;
  const void* bias;        // or null
  const int32_t* choices;  // the given experts, or null
  int64_t num_tokens;
  int num_experts;
  int top_k;
  int num_real_experts;
  int first_constant;  // the first constant expert, behind the identity experts
  int first_drop;      // the first drop expert
  int num_expert_group;
  int topk_group;
  float routed_scaling_factor;
  ScalarType logits_type;
  ScalarType bias_type;
  ScoringFunc scoring_func;
  bool logits_fit_vectors;  // every row is aligned for the widest load
  bool bias_fits_vectors;   // the bias too, and it is float32
  bool renormalize;
  bool drop_before_renormalize;
};

// Loads

template <ScalarType type>
__device__ __forceinline__ float load_element(const void* data, int64_t index) {
  if constexpr (kIsFloating<type>) {
    return to_float(static_cast<const DeviceType<type>*>(data)[index]);
  } else {
    __builtin_unreachable();  // RoutingInputs::validate_inputs refuses the type
  }
}

/// An element of data of any floating type.
__device__ __forceinline__ float load_as_float(const void* data, ScalarType type, int64_t index) {
#define ZEXPERT_LOAD_CASE(enumerator, text)                                    \
  if (kIsFloating<ScalarType::enumerator> && type == ScalarType::enumerator) { \
    return load_element<ScalarType::enumerator>(data, index);                  \
  }
  ZEXPERT_SCALAR_TYPES(ZEXPERT_LOAD_CASE)
#undef ZEXPERT_LOAD_CASE
  __builtin_unreachable();
}

template <int kVector, typename T>
__device__ __forceinline__ void load_vector(const T* source, float (&values)[kVector]) {
  const Vector<T, kVector> vector = *reinterpret_cast<const Vector<T, kVector>*>(source);
#pragma unroll
  for (int v = 0; v < kVector; ++v) values[v] = to_float(vector.values[v]);
}

// Scores. The intrinsics with a rounding mode are never fused, so a score has the same bits wherever it is computed.

__device__ __forceinline__ bool is_finite(float value) { return fabsf(value) < INFINITY; }

/// 2^x to within 2 units in the last place; 0 below the normal numbers.
__device__ __forceinline__ float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

/// 1 / x to within a unit in the last place, for x within the normal numbers.
__device__ __forceinline__ float reciprocal(float x) {
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(x));
  return __fmaf_rn(estimate, __fmaf_rn(-x, estimate, 1.0F), estimate);
}

#include "scoring_functions-inl.h"

/// What softmax needs to know of a row.
struct RowScale {
  float largest;  // the largest logit
  float inverse;  // 1 / sum of the terms
};

/// The score of one logit; `row` is of softmax alone.
template <bool kCareful>
__device__ __forceinline__ float score_of(ScoringFunc scoring_func, float logit, RowScale row) {
  return visit_scoring_func(scoring_func, [&](auto scoring) {
    using Scoring = decltype(scoring);
    if constexpr (Scoring::kIsSoftmax) {
      return __fmul_rn(Scoring::template term<kCareful>(logit, row.largest), row.inverse);
    } else {
      return Scoring::score(logit);
    }
  });
}

// Selection

/// Bits that compare as unsigned integers in the order of the floats. NaN has 0, every other float has more.
__device__ __forceinline__ unsigned ordered_bits(float value) {
  const unsigned bits = __float_as_uint(value);
  const unsigned ordered = (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
  return isnan(value) ? 0U : ordered;
}

__device__ __forceinline__ float from_ordered_bits(unsigned ordered) {
  return __uint_as_float((ordered & 0x80000000U) != 0 ? ordered & 0x7fffffffU : ~ordered);
}

/// A number that compares in the order of choice: larger key first, then lower index. 0, the least, for a NaN key.
__device__ __forceinline__ uint64_t choice_word(unsigned key_bits, unsigned index) {
  return key_bits == 0 ? 0 : (static_cast<uint64_t>(key_bits) << 32) | ~index;
}
__device__ __forceinline__ int index_of(uint64_t word) { return static_cast<int>(~static_cast<unsigned>(word)); }

/// The score of a group from the ordered bits of its two largest keys (0 for none): their sum, the first if there is no
/// second, -inf if there is none or the sum is NaN.
__device__ __forceinline__ float group_score(unsigned first, unsigned second) {
  if (first == 0)
    return -INFINITY;
  const float score = second == 0 ? from_ordered_bits(first) : from_ordered_bits(first) + from_ordered_bits(second);
  return isnan(score) ? -INFINITY : score;
}

/// Whether `group` is among the best topk_group groups.
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

/// The expert given for a slot of a token; -1 for an empty slot and for a number that is not an expert's.
__device__ __forceinline__ int given_expert(const RoutingArguments& arguments, int64_t token, int slot) {
  const int expert = slot < arguments.top_k ? arguments.choices[token * arguments.top_k + slot] : -1;
  return expert >= 0 && expert < arguments.num_experts ? expert : -1;
}

/// One slot of a token, held by a lane.
struct Slot {
  int index;   // top_k or more: no slot
  int expert;  // among all experts; -1: no expert could be chosen
  float score;

  __device__ bool is_of_row(const RoutingArguments& arguments) const { return index < arguments.top_k; }
  /// The weight before renormalisation and scaling.
  __device__ float weight(const RoutingArguments& arguments) const {
    const bool counts =
        is_of_row(arguments) && expert >= 0 && !(arguments.drop_before_renormalize && expert >= arguments.first_drop);
    return counts ? score : 0.0F;
  }
};

}  // namespace zexpert::cuda
