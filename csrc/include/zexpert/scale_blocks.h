// SPDX-License-Identifier: Apache-2.0
// The blocks of a quantised weight that share a scale.
#pragma once

#include <cstdint>

namespace zexpert {

inline constexpr int64_t kScaleBlock = 128;  ///< quantised weights have a scale for each block of 128 x 128

/// Blocks that `size` rows or columns of a quantised weight are cut into; the last one may be smaller.
constexpr int64_t num_scale_blocks(int64_t size) { return (size + kScaleBlock - 1) / kScaleBlock; }

}  // namespace zexpert
