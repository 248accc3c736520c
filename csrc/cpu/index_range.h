// SPDX-License-Identifier: Apache-2.0
// Range checks of index arrays, before a kernel writes anything.
#pragma once

#include <cstdint>

namespace zexpert {

/// Position of the first index outside [low, high), or -1.
template <typename Index>
inline int64_t find_out_of_range(const Index* indices, int64_t count, int64_t low, int64_t high) {
  // Blocks without an exit inside, so that the compiler can check several indices at once.
  constexpr int64_t kBlock = 1024;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    bool outside = false;
    for (int64_t i = begin; i < end; ++i) {
      outside |= indices[i] < low || indices[i] >= high;
    }
    if (outside) {
      for (int64_t i = begin; i < end; ++i) {
        if (indices[i] < low || indices[i] >= high) {
          return i;
        }
      }
    }
  }
  return -1;
}

}  // namespace zexpert
