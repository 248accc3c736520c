// SPDX-License-Identifier: Apache-2.0
// rank_barrier: no rank goes on before all have come.
#pragma once

#include <cstdint>

#include "zexpert/check_params.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/error.h"
#include "zexpert/rank_arrays.h"

namespace zexpert {

/// What a rank that gave up writes in the place of its number of barriers: the others then give up at once.
inline constexpr int64_t kGaveUp = -1;

/// This rank's n-th barrier writes n into signals[p][rank] of every rank p, and waits until signals[rank][p] is at
/// least n for every p. What a rank wrote into any rank's memory before the barrier, all ranks can read after it.
/// No barrier after one that failed waits. All pointers are to memory that the computing device addresses.
struct RankBarrierParams {
  RankArrays signals;         ///< [num_ranks] int64, 0 at first
  int64_t* epoch = nullptr;   ///< this rank's barriers so far, 0 at first
  float* validity = nullptr;  ///< 1 at first, NaN after a barrier that failed: scale by it what depends on other ranks
  int32_t* absent_rank = nullptr;  ///< in host memory: -1 at first, then a rank that did not come
  int64_t rank = 0;                ///< this process's
  int64_t num_ranks = 1;
  int64_t timeout_ms = 0;

  /// Throws Error for a number out of range or a missing array.
  void validate() const {
    detail::check_ranks(rank, num_ranks);
    ZEXPERT_CHECK(timeout_ms >= 1, "timeout_ms must be at least 1, got ", timeout_ms);
    detail::check_arrays("signals", signals, num_ranks);
    detail::check_pointers({{"epoch", epoch}, {"validity", validity}, {"absent_rank", absent_rank}});
  }
};

/// The CPU throws Error if a rank does not come within timeout_ms, or gave up. CUDA, where the host does not wait, sets
/// validity and absent_rank.
void rank_barrier_cpu(const RankBarrierParams& params);
void rank_barrier_cuda(const RankBarrierParams& params, cudaStream_t stream);

}  // namespace zexpert
