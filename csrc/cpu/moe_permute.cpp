// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_permute.h"

#include <algorithm>
#include <cstring>

#include "cpu/check_params.h"
#include "zexpert/parallel.h"

namespace zexpert {
namespace {

// Below this many bytes a range costs less than waking a thread.
constexpr int64_t kGrainBytes = 128 * 1024;

int64_t element_size(ScalarType type) {
  int64_t size = 0;
  visit_floating(type, [&](auto element) { size = static_cast<int64_t>(sizeof(element)); });
  return size;
}

}  // namespace

void moe_permute_cpu(const MoePermuteParams& params) {
  check_row_slots(params, params.num_rows);
  if (params.num_rows == 0 || params.hidden_size == 0) {
    return;
  }
  check_pointers({{"hidden_states", params.hidden_states}, {"rows", params.rows}});

  const int64_t element = element_size(params.data_type);
  const int64_t row_bytes = params.hidden_size * element;
  const int64_t hidden_row_bytes = params.hidden_row_stride * element;
  const auto* hidden_states = static_cast<const char*>(params.hidden_states);
  auto* rows = static_cast<char*>(params.rows);
  const int64_t grain_size = std::max<int64_t>(kGrainBytes / row_bytes, 1);
  parallel_for(0, params.num_rows, grain_size, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t token = params.row_slots[row] / params.top_k;
      std::memcpy(rows + row * row_bytes, hidden_states + token * hidden_row_bytes, static_cast<size_t>(row_bytes));
    }
  });
}

}  // namespace zexpert
