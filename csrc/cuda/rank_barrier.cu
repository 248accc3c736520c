// SPDX-License-Identifier: Apache-2.0
#include "zexpert/rank_barrier.h"

#include <cuda_runtime.h>

#include <cstdint>
#include <cuda/atomic>

#include "cuda/launch.cuh"

namespace zexpert {
namespace cuda {
namespace {

/// A word that several GPUs, or a GPU and the host, access.
template <typename T>
using SystemWord = ::cuda::atomic_ref<T, ::cuda::thread_scope_system>;

__device__ __forceinline__ int64_t nanoseconds() {
  int64_t time = 0;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

/// A thread per rank.
__global__ void __launch_bounds__(kMaxRanks) rank_barrier(const RankBarrierParams params) {
  __shared__ int64_t epoch;
  __shared__ bool has_failed;      // before this barrier
  __shared__ volatile bool fails;  // one thread's failure ends the waiting of all
  wait_for_previous_kernels();     // what they wrote into other ranks' memory comes before the signals
  let_next_kernel_start();
  const auto peer = static_cast<int>(threadIdx.x);
  if (peer == 0) {
    epoch = *params.epoch + 1;
    has_failed = isnan(*params.validity);
    fails = has_failed;
  }
  __syncthreads();
  if (!has_failed && peer < params.num_ranks) {
    // Signal
    __threadfence_system();
    int64_t* const there = static_cast<int64_t*>(params.signals.of_rank[peer]) + params.rank;
    SystemWord<int64_t>(*there).store(epoch, ::cuda::memory_order_release);
    // Wait
    int64_t* const here = static_cast<int64_t*>(params.signals.of_rank[params.rank]) + peer;
    const int64_t deadline = nanoseconds() + params.timeout_ms * 1'000'000;
    while (!fails) {
      const int64_t signal = SystemWord<int64_t>(*here).load(::cuda::memory_order_acquire);
      if (signal >= epoch)
        break;
      if (signal == kGaveUp || nanoseconds() > deadline) {
        fails = true;
        SystemWord<int32_t>(*params.absent_rank).store(peer, ::cuda::memory_order_relaxed);
      }
    }
  }
  __syncthreads();
  if (peer == 0) {
    *params.epoch = epoch;
    if (fails)
      *params.validity = __int_as_float(0x7fc00000);  // NaN
  }
  if (fails && peer < params.num_ranks) {
    int64_t* const there = static_cast<int64_t*>(params.signals.of_rank[peer]) + params.rank;
    SystemWord<int64_t>(*there).store(kGaveUp, ::cuda::memory_order_release);
  }
}

}  // namespace
}  // namespace cuda

void rank_barrier_cuda(const RankBarrierParams& params, cudaStream_t stream) {
  params.validate();
  const auto threads = static_cast<int>((params.num_ranks + cuda::kWarpSize - 1) / cuda::kWarpSize) * cuda::kWarpSize;
  cuda::launch("rank_barrier", &cuda::rank_barrier, 1, threads, 0, stream, params);
}

}  // namespace zexpert
