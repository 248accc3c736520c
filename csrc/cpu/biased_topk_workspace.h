// SPDX-License-Identifier: Apache-2.0
// Memory that a call of biased_topk or its backward, and each of its threads, works in. It has internal linkage:
// kernels that are compiled for one instruction set instantiate it.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cpu/aligned_array.h"
#include "zexpert/biased_topk.h"

namespace zexpert {
namespace {

/// Keys are compared in blocks of this many, one bit of a 64-bit word for each. Rows are padded to whole blocks.
constexpr int64_t kBlock = 64;

/// What all rows of a call share.
template <typename T>
struct SharedByRows {
  const RoutingInputs& inputs;
  const T* bias;           ///< [padded_experts], zeros for none
  int64_t padded_experts;  ///< num_experts rounded up to whole blocks and to the lanes of the first selection step
};

/// Memory in which a thread routes a row.
template <typename T>
struct Workspace {
  Workspace(int64_t padded_experts, int64_t num_groups)
      : scores(padded_experts),
        keys(padded_experts),
        candidates(padded_experts + kSlack),
        group_scores(num_groups),
        group_order(num_groups) {}

  /// A step may write this far past the last candidate.
  static constexpr int64_t kSlack = 16;

  AlignedArray<T> scores;            ///< before the row's common factor; NaN for a masked expert
  AlignedArray<T> keys;              ///< NaN for an expert that cannot be chosen
  AlignedArray<int32_t> candidates;  ///< experts whose key may be among the largest
  AlignedArray<T> group_scores;
  AlignedArray<int32_t> group_order;
};

/// The first step of selection keeps the largest key of each of this many interleaved parts of a row. With twice top_k
/// parts or more, candidates are few.
inline int64_t num_lanes(int64_t top_k) { return top_k <= 16 ? 32 : top_k <= 32 ? 64 : 128; }

inline int64_t pad_experts(const RoutingSpec& spec) {
  const int64_t multiple = std::max(kBlock, num_lanes(spec.top_k));
  return (spec.num_logits + multiple - 1) / multiple * multiple;
}

/// The bias in the form of SharedByRows.
template <typename T>
AlignedArray<T> convert_bias(const RoutingInputs& inputs, int64_t padded_experts) {
  AlignedArray<T> bias(padded_experts);
  std::fill(bias.get(), bias.get() + padded_experts, T(0));
  if (inputs.bias != nullptr) {
    visit_floating(inputs.bias_type, [&](auto element) {
      const auto* source = static_cast<const decltype(element)*>(inputs.bias);
      std::transform(source, source + inputs.spec.num_logits, bias.get(),
                     [](auto value) { return static_cast<T>(value); });
    });
  }
  return bias;
}

}  // namespace
}  // namespace zexpert
