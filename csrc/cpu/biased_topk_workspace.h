// SPDX-License-Identifier: Apache-2.0
// What biased_topk and its backward prepare around their kernels: memory of a call and of a thread.
//
// All of it has internal linkage, since kernels for one instruction set instantiate it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/aligned_array.h"
#include "zexpert/biased_topk.h"

namespace zexpert {
namespace {

/// Keys are looked through in blocks of this many, one bit each of a 64-bit word. Rows are padded to whole blocks.
constexpr int64_t kBlock = 64;

/// What all rows of a call share.
template <typename T>
struct SharedByRows {
  const BiasedTopKParams& params;
  const T* bias;           ///< [padded_experts], zeros where there is none
  int64_t padded_experts;  ///< num_experts rounded up to whole blocks and to the lanes of the first selection step
};

/// What one thread needs to route a row.
template <typename T>
struct Workspace {
  Workspace(int64_t padded_experts, int64_t num_groups)
      : scores(padded_experts),
        keys(padded_experts),
        candidates(padded_experts + kSlack),
        group_scores(num_groups),
        group_order(num_groups) {}

  /// How far past the last candidate a step may write.
  static constexpr int64_t kSlack = 16;

  AlignedArray<T> scores;            ///< before the row's common factor; NaN where masked
  AlignedArray<T> keys;              ///< NaN where not choosable
  AlignedArray<int32_t> candidates;  ///< experts whose key may be among the largest
  AlignedArray<T> group_scores;
  AlignedArray<int32_t> group_order;
};

/// The first step of selection keeps the largest key of each of this many interleaved parts of a row. At least twice
/// top_k parts keep the candidates few.
inline int64_t num_lanes(int64_t top_k) { return top_k <= 16 ? 32 : top_k <= 32 ? 64 : 128; }

inline int64_t pad_experts(const RoutingSpec& spec) {
  const int64_t multiple = std::max(kBlock, num_lanes(spec.top_k));
  return (spec.num_experts + multiple - 1) / multiple * multiple;
}

/// The bias as SharedByRows has it.
template <typename T>
AlignedArray<T> convert_bias(const BiasedTopKParams& params, int64_t padded_experts) {
  AlignedArray<T> bias(padded_experts);
  std::fill(bias.get(), bias.get() + padded_experts, T(0));
  if (params.bias != nullptr) {
    visit_floating(params.bias_type, [&](auto element) {
      const auto* source = static_cast<const decltype(element)*>(params.bias);
      std::transform(source, source + params.spec.num_experts, bias.get(),
                     [](auto value) { return static_cast<T>(value); });
    });
  }
  return bias;
}

}  // namespace
}  // namespace zexpert
