// SPDX-License-Identifier: Apache-2.0
// Instructions between the blocks of a cluster: copies into several blocks' shared memory, arrivals at another block's
// barrier, loads from another block's shared memory. See the PTX ISA, chapters cp.async.bulk.tensor, mapa, mbarrier
// and barrier.cluster. Only for code compiled for sm_90a.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace zexpert::cuda::ptx {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

/// The cluster's blocks meet: what their threads wrote to shared memory before is seen after. All threads call it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

/// The cluster's blocks meet, without a fence: for threads that have read, or have only initialised barriers.
__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed;\n\tbarrier.cluster.wait;" ::: "memory");
}

/// The address, for instructions on a cluster's shared memory, of what is at `address` in block `rank`.
__device__ __forceinline__ uint32_t address_in_block(uint32_t address, uint32_t rank) {
  uint32_t result;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(address), "r"(rank));
  return result;
}

/// For threads that have read what the barrier guards: a release in the cluster would be a fence of all memory.
/// `barrier` is an address_in_block.
__device__ __forceinline__ void barrier_arrive_in_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

/// `address` is an address_in_block.
__device__ __forceinline__ float4 load_in_cluster(uint32_t address) {
  float4 value;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

/// Copies a box to the same place in every block of `blocks`, a bit for each rank. The bytes count on each block's own
/// barrier, at the place of `barrier`.
__device__ __forceinline__ void load_box_2d_into_blocks(uint32_t destination, const CUtensorMap& map, uint32_t barrier,
                                                        uint16_t blocks, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4, "
      "%5}], [%2], %3;" ::"r"(destination),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(barrier), "h"(blocks), "r"(c0), "r"(c1)
      : "memory");
}

/// What ordinary stores to this block's shared memory wrote before is seen by later matrix instructions.
__device__ __forceinline__ void fence_async_proxy_of_block() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

/// Brings a box into the L2 cache.
__device__ __forceinline__ void prefetch_box_2d(const CUtensorMap& map, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(reinterpret_cast<uint64_t>(&map)),
      "r"(c0), "r"(c1)
      : "memory");
}

__device__ __forceinline__ float2 load_shared_pair(uint32_t address) {
  float2 value;
  asm volatile("ld.shared::cta.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}

}  // namespace zexpert::cuda::ptx
