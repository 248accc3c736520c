// SPDX-License-Identifier: Apache-2.0
// Offsets and row tiles of segments, for the tests of grouped_mlp_hopper.
#pragma once

#include <numeric>
#include <vector>

#include "cuda/grouped_mlp/schedule.h"

namespace zexpert::testing {

/// 0, and the sum up to and with each number.
inline std::vector<int> ascending(const std::vector<int>& segments) {
  std::vector<int> offsets(segments.size() + 1);
  std::partial_sum(segments.begin(), segments.end(), offsets.begin() + 1);
  return offsets;
}

inline std::vector<int> row_tile_starts(const std::vector<int>& segments, int max_rows_per_tile) {
  std::vector<int> tiles;
  for (const int rows : segments) tiles.push_back(cuda::split_segment(rows, max_rows_per_tile).num_tiles);
  return ascending(tiles);
}

}  // namespace zexpert::testing
