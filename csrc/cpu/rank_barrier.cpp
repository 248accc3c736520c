// SPDX-License-Identifier: Apache-2.0
#include "zexpert/rank_barrier.h"

#include <chrono>
#include <limits>
#include <thread>

namespace zexpert {
namespace {

// The ranks are processes. A std::atomic object belongs to one process, so it is not used.

void store_release(int64_t* address, int64_t value) { __atomic_store_n(address, value, __ATOMIC_RELEASE); }
int64_t load_acquire(const int64_t* address) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }

void signal_all(const RankBarrierParams& params, int64_t value) {
  for (int64_t peer = 0; peer < params.num_ranks; ++peer) {
    store_release(static_cast<int64_t*>(params.signals.of_rank[peer]) + params.rank, value);
  }
}

/// Waits until all signals are at least `epoch`. Returns a rank that gave up or has not come by the deadline, or -1.
int64_t find_absent_rank(const RankBarrierParams& params, int64_t epoch,
                         std::chrono::steady_clock::time_point deadline) {
  const auto* signals = static_cast<const int64_t*>(params.signals.of_rank[params.rank]);
  constexpr int kTriesAwake = 1000;  // others may need this core to come
  for (int64_t tries = 0;; ++tries) {
    const bool is_late = std::chrono::steady_clock::now() > deadline;
    bool all_came = true;
    for (int64_t peer = 0; peer < params.num_ranks; ++peer) {
      const int64_t signal = load_acquire(signals + peer);
      if (signal == kGaveUp || (signal < epoch && is_late)) {
        return peer;
      }
      all_came = all_came && signal >= epoch;
    }
    if (all_came) {
      return -1;
    }
    if (tries < kTriesAwake) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
}

}  // namespace

void rank_barrier_cpu(const RankBarrierParams& params) {
  params.validate();
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(params.timeout_ms);
  const int64_t epoch = ++*params.epoch;
  if (*params.absent_rank < 0) {
    signal_all(params, epoch);
    const int64_t absent = find_absent_rank(params, epoch, deadline);
    if (absent >= 0) {
      *params.absent_rank = static_cast<int32_t>(absent);
      *params.validity = std::numeric_limits<float>::quiet_NaN();
      signal_all(params, kGaveUp);
    }
  }
  ZEXPERT_CHECK(*params.absent_rank < 0, "rank ", *params.absent_rank, " did not come within ", params.timeout_ms,
                " ms, or gave up");
}

}  // namespace zexpert
