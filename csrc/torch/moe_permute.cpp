// SPDX-License-Identifier: Apache-2.0
#include "torch/moe_permute.h"

#include <torch/csrc/stable/library.h>

#include <optional>

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)
namespace {

Tensor moe_permute_on_cpu(const Tensor& hidden_states, const Tensor& row_slots, const Tensor& expert_offsets,
                          int64_t top_k, const std::optional<Tensor>& slot_rows) {
  return moe_permute(hidden_states, row_slots, expert_offsets, top_k, slot_rows,
                     [](MoePermuteParams params, const Tensor& offsets) {
                       params.num_rows = last_offset(offsets, params.num_rows);
                       moe_permute_cpu(params);
                     });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(zexpert, CPU, m) { m.impl("moe_permute", TORCH_BOX(&moe_permute_on_cpu)); }

HIDDEN_NAMESPACE_END(zexpert, ops)
