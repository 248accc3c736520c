// SPDX-License-Identifier: Apache-2.0
// Compiled once per instruction set by router_logits.cpp through for_each_isa.h.
//
// Tokens are multiplied in runs of up to kMaxRows, which are packed first; the threads share a run's blocks of experts.
// A library's matrix product would choose another kernel, and so another order of additions, for another number of
// tokens. Here the order depends on hidden_size alone: see grouped_mlp_product-inl.h.
#include "cpu/grouped_mlp_product-inl.h"

/// Copies a run of tokens in the type of the sums: a group's tokens interleaved, padded with zeros to whole vectors.
template <typename T>
void pack_tokens(const RouterLogitsParams& params, int64_t first_token, const RowGroup* groups, int64_t num_groups,
                 accumulate_t<T>* packed) {
  using V = Vec<accumulate_t<T>>;
  constexpr int64_t kGrainElements = 32768;
  const int64_t depth = params.hidden_size;
  const int64_t padded_depth = round_up(depth, V::kWidth);
  const int64_t grain_size =
      std::max<int64_t>(kGrainElements / std::max<int64_t>(depth * most_rows<accumulate_t<T>>(), 1), 1);
  parallel_for(0, num_groups, grain_size, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const RowGroup& group = groups[g];
      for (int64_t r = 0; r < group.num_rows; ++r) {
        const T* source = static_cast<const T*>(params.hidden_states) +
                          (first_token + group.first_row + r) * params.hidden_row_stride;
        accumulate_t<T>* target = packed + group.first_packed_row * padded_depth + r * V::kWidth;
        int64_t i = 0;
        for (; i + V::kWidth <= depth; i += V::kWidth) V::load(source + i).store(target + i * group.num_rows);
        if (i < depth) {
          V::load_partial(source + i, depth - i, 0).store(target + i * group.num_rows);
        }
      }
    }
  });
}

/// Experts of a block: their weights stay in the second-level cache while a run's tokens pass.
template <typename A>
int64_t experts_of_block(int64_t depth) {
  constexpr int64_t kBlockBytes = 256 * 1024;
  const int64_t experts = kBlockBytes / std::max<int64_t>(depth * static_cast<int64_t>(sizeof(A)), 1);
  return std::clamp(experts / kPanel * kPanel, kPanel, kMaxChannels);
}

template <typename T>
void router_logits(const RouterLogitsParams& params) {
  using A = accumulate_t<T>;
  constexpr int64_t kMaxGroups = kMaxRows / most_rows<A>();
  const int64_t depth = params.hidden_size;
  const int64_t block_experts = experts_of_block<A>(depth);
  const int64_t num_blocks = (params.num_experts + block_experts - 1) / block_experts;
  const int64_t run_tokens = std::min(params.num_tokens, kMaxGroups * most_rows<A>());
  const AlignedArray<A> packed(run_tokens * round_up(depth, Vec<A>::kWidth));

  const auto find_experts = [&](int64_t block, Channels<A>& channels) {
    const int64_t first = block * block_experts;
    channels.count = round_up(std::min(block_experts, params.num_experts - first), kPanel);
    for (int64_t c = 0; c < channels.count; ++c) {
      const int64_t expert = std::min(first + c, params.num_experts - 1);
      channels.rows[c] = static_cast<const A*>(params.weight) + expert * params.weight_row_stride;
    }
  };
  for (int64_t first_token = 0; first_token < params.num_tokens; first_token += run_tokens) {
    const int64_t num_tokens = std::min(run_tokens, params.num_tokens - first_token);
    RowGroup groups[static_cast<size_t>(kMaxGroups)];
    const int64_t num_groups = (num_tokens + most_rows<A>() - 1) / most_rows<A>();
    for (int64_t g = 0; g < num_groups; ++g) {
      const int64_t first = num_tokens * g / num_groups;
      groups[g] = {first, first, num_tokens * (g + 1) / num_groups - first};
    }
    pack_tokens<T>(params, first_token, groups, num_groups, packed.get());
    parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
      const AlignedArray<A> sums(kMaxRows * kMaxChannels);
      Channels<A> experts;
      Channels<A> next;
      find_experts(begin, experts);
      for (int64_t block = begin; block < end; ++block) {
        next.count = 0;
        if (block + 1 < end) {
          find_experts(block + 1, next);
        }
        multiply<A>(packed.get(), groups, num_groups, experts, depth, next, sums.get());
        const int64_t first_expert = block * block_experts;
        const int64_t num_experts = std::min(block_experts, params.num_experts - first_expert);
        for (int64_t t = 0; t < num_tokens; ++t) {
          A* target = static_cast<A*>(params.logits) + (first_token + t) * params.num_experts + first_expert;
          std::copy_n(sums.get() + t * kMaxChannels, num_experts, target);
        }
        std::swap(experts, next);
      }
    });
  }
}
