// SPDX-License-Identifier: Apache-2.0
#include "zexpert/rank_barrier.h"

#include <chrono>
#include <limits>
#include <thread>

namespace zexpert {
namespace {

// The ranks are processes: no std::atomic, whose objects belong to one.

void store_release(int64_t* address, int64_t value) { __atomic_store_n(address, value, __ATOMIC_RELEASE); }
int64_t load_acquire(const int64_t* address) { return __atomic_load_n(address, __ATOMIC_ACQUIRE); }

void signal_all(const RankBarrierParams& params, int64_t value) {
  for (int64_t peer = 0; peer < params.num_ranks; ++peer) {
    store_release(static_cast<int64_t*>(params.signals.of_rank[peer]) + params.rank, value);
  }
}

/// The signal of rank `peer`, once it is at least `epoch` or kGaveUp, or the time is over.
int64_t wait_for(const RankBarrierParams& params, int64_t peer, int64_t epoch,
                 std::chrono::steady_clock::time_point deadline) {
  const int64_t* signal = static_cast<const int64_t*>(params.signals.of_rank[params.rank]) + peer;
  constexpr int kTriesAwake = 1000;  // others may need this core to come
  for (int64_t tries = 0;; ++tries) {
    const int64_t value = load_acquire(signal);
    if (value >= epoch || value == kGaveUp || std::chrono::steady_clock::now() > deadline) {
      return value;
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
    for (int64_t peer = 0; peer < params.num_ranks; ++peer) {
      if (wait_for(params, peer, epoch, deadline) < epoch) {
        *params.absent_rank = static_cast<int32_t>(peer);
        *params.validity = std::numeric_limits<float>::quiet_NaN();
        signal_all(params, kGaveUp);
        break;
      }
    }
  }
  ZEXPERT_CHECK(*params.absent_rank < 0, "rank ", *params.absent_rank, " did not come within ", params.timeout_ms,
                " ms, or gave up");
}

}  // namespace zexpert
