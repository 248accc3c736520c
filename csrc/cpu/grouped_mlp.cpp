// SPDX-License-Identifier: Apache-2.0
#include "zexpert/grouped_mlp.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <utility>
#include <vector>

#include "cpu/aligned_array.h"
#include "cpu/check_params.h"
#include "zexpert/parallel.h"

namespace zexpert {
namespace {

/// An expert that grouped_mlp_cpu computes.
struct Segment {
  int64_t expert;
  int64_t first_row;
  int64_t num_rows;
  int64_t first_group = 0;
  int64_t num_groups = 0;
};

/// Rows of a segment that are multiplied together. All segments' rows are packed, those of a group interleaved: vector
/// `v` of the group's row `r` is vector first_packed_row * (vectors per row) + v * num_rows + r.
struct RowGroup {
  int64_t first_row;
  int64_t first_packed_row;
  int64_t num_rows;
};

/// Rows that are computed in one run, if no segment has more. Their copies and activations are so small that allocators
/// keep the memory from one run to the next; larger memory comes as fresh pages each time.
constexpr int64_t kRowsAtOnce = 1024;

/// The segments, in runs of up to kRowsAtOnce rows or of a single longer segment.
std::vector<std::vector<Segment>> find_segments(const GroupedMlpParams& params, int64_t max_rows) {
  std::vector<std::vector<Segment>> runs;
  int64_t rows_of_run = kRowsAtOnce;
  for (int64_t expert = 0; expert < params.num_experts; ++expert) {
    const int64_t first_row = params.expert_offsets[expert];
    const int64_t num_rows = params.expert_offsets[expert + 1] - first_row;
    if (num_rows >= 1 && num_rows <= max_rows) {
      rows_of_run += num_rows;
      if (rows_of_run > kRowsAtOnce) {
        runs.emplace_back();
        rows_of_run = num_rows;
      }
      runs.back().push_back({expert, first_row, num_rows});
    }
  }
  return runs;
}

/// Cuts every segment into as few groups of up to `most_rows` rows as possible, of about the same size.
std::vector<RowGroup> cut_into_groups(std::vector<Segment>& segments, int64_t most_rows) {
  std::vector<RowGroup> groups;
  int64_t packed_rows = 0;
  for (Segment& segment : segments) {
    segment.first_group = static_cast<int64_t>(groups.size());
    segment.num_groups = (segment.num_rows + most_rows - 1) / most_rows;
    for (int64_t g = 0; g < segment.num_groups; ++g) {
      const int64_t begin = segment.num_rows * g / segment.num_groups;
      const int64_t end = segment.num_rows * (g + 1) / segment.num_groups;
      groups.push_back({segment.first_row + begin, packed_rows + begin, end - begin});
    }
    packed_rows += segment.num_rows;
  }
  return groups;
}

}  // namespace
}  // namespace zexpert

#define ZEXPERT_KERNEL_FILE "cpu/grouped_mlp_kernel-inl.h"
#include "cpu/simd/for_each_isa.h"

namespace zexpert {

void grouped_mlp_cpu(const GroupedMlpParams& params, int64_t max_rows) {
  params.validate();
  ZEXPERT_CHECK(params.tile_rows == 0, "tile_rows must be 0 on the CPU, got ", params.tile_rows);
  check_expert_rows(params);
  if (params.is_empty()) {
    return;
  }
  visit_floating(params.data_type, [&](auto element) {
    using T = decltype(element);
    for (std::vector<Segment>& run : find_segments(params, max_rows)) {
      if (params.has_fp8_weights()) {
        ZEXPERT_DISPATCH(grouped_mlp_with_scales<T>, params, run)
      } else {
        ZEXPERT_DISPATCH(grouped_mlp<T>, params, run)
      }
    }
  });
}

}  // namespace zexpert
