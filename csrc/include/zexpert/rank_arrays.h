// SPDX-License-Identifier: Apache-2.0
// Arrays of every rank that all ranks can write: on GPUs symmetric memory, on CPUs memory that processes share.
#pragma once

#include <cstdint>

#include "zexpert/error.h"

namespace zexpert {

/// Most ranks that share memory: kernels receive the addresses of all as arguments.
inline constexpr int64_t kMaxRanks = 64;

/// The same array of each rank, as this process addresses it.
struct RankArrays {
  void* of_rank[kMaxRanks] = {};
};

namespace detail {

inline void check_ranks(int64_t rank, int64_t num_ranks) {
  ZEXPERT_CHECK(num_ranks >= 1 && num_ranks <= kMaxRanks, "num_ranks must be between 1 and ", kMaxRanks, ", got ",
                num_ranks);
  ZEXPERT_CHECK(rank >= 0 && rank < num_ranks, "rank must be between 0 and ", num_ranks - 1, ", got ", rank);
}

inline void check_arrays(const char* name, const RankArrays& arrays, int64_t num_ranks) {
  for (int64_t rank = 0; rank < num_ranks; ++rank) {
    ZEXPERT_CHECK(arrays.of_rank[rank] != nullptr, name, " of rank ", rank, " must not be null");
  }
}

}  // namespace detail
}  // namespace zexpert
