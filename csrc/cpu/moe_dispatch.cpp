// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_dispatch.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "cpu/check_params.h"
#include "zexpert/parallel.h"

namespace zexpert {
namespace {

/// Writes slot_rows and row_tokens.
template <typename Id>
void place_tokens(const MoeDispatchParams& params) {
  const auto* topk_ids = static_cast<const Id*>(params.topk_ids);
  std::fill_n(params.row_tokens, params.num_ranks * params.max_tokens, -1);
  for (int64_t peer = 0; peer < params.num_ranks; ++peer) {
    const int64_t first_expert = peer * params.num_local_experts;
    int64_t row = peer * params.max_tokens;
    for (int64_t token = 0; token < params.num_tokens; ++token) {
      const Id* ids = topk_ids + token * params.top_k;
      const bool is_sent = std::any_of(ids, ids + params.top_k, [&](Id id) {
        return id >= first_expert && id < first_expert + params.num_local_experts;
      });
      params.slot_rows[token * params.num_ranks + peer] = is_sent ? static_cast<int32_t>(row) : -1;
      if (is_sent) {
        params.row_tokens[row++] = static_cast<int32_t>(token);
      }
    }
  }
}

/// Writes a row of a rank with everything that belongs to it.
template <typename T, typename Id>
void send_row(const MoeDispatchParams& params, int64_t peer, int64_t position) {
  const int64_t token = params.row_tokens[peer * params.max_tokens + position];
  const int64_t row = params.rank * params.max_tokens + position;
  const int64_t first_slot = row * params.top_k;
  int32_t* ids = static_cast<int32_t*>(params.ids.of_rank[peer]) + first_slot;
  if (token < 0) {
    std::fill_n(ids, params.top_k, -1);
    return;
  }
  const Id* own_ids = static_cast<const Id*>(params.topk_ids) + token * params.top_k;
  for (int64_t k = 0; k < params.top_k; ++k) {
    const int64_t local = static_cast<int64_t>(own_ids[k]) - peer * params.num_local_experts;
    ids[k] = local >= 0 && local < params.num_local_experts ? static_cast<int32_t>(local) : -1;
  }
  using Weight = accumulate_t<T>;
  std::copy_n(static_cast<const Weight*>(params.topk_weights) + token * params.top_k, params.top_k,
              static_cast<Weight*>(params.weights.of_rank[peer]) + first_slot);
  if (params.hidden_size > 0) {
    std::memcpy(static_cast<T*>(params.rows.of_rank[peer]) + row * params.hidden_size,
                static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride,
                static_cast<size_t>(params.hidden_size) * sizeof(T));
  }
}

}  // namespace

void moe_dispatch_cpu(const MoeDispatchParams& params) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  visit_index(params.ids_type, [&](auto id) {
    using Id = decltype(id);
    const auto* topk_ids = static_cast<const Id*>(params.topk_ids);
    const int64_t num_experts = params.num_ranks * params.num_local_experts;
    const int64_t bad = find_out_of_range(topk_ids, params.num_tokens * params.top_k, -1, num_experts);
    ZEXPERT_CHECK(bad < 0, "topk_ids must be in [-1, ", num_experts, "), got ", topk_ids[bad]);
    place_tokens<Id>(params);

    // Below this many bytes a range costs less than waking a thread.
    constexpr int64_t kGrainBytes = 128 * 1024;
    visit_floating(params.data_type, [&](auto element) {
      using T = decltype(element);
      const int64_t row_bytes = std::max<int64_t>(params.hidden_size * static_cast<int64_t>(sizeof(T)), 1);
      parallel_for(0, params.num_ranks * params.max_tokens, std::max<int64_t>(kGrainBytes / row_bytes, 1),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) {
                       send_row<T, Id>(params, row / params.max_tokens, row % params.max_tokens);
                     }
                   });
    });
  });
}

}  // namespace zexpert
