// SPDX-License-Identifier: Apache-2.0
// Launches of kernels. Every launch is checked. On Hopper and later a kernel may start while the previous one in the
// stream still runs (programmatic dependent launch).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/reduce.cuh"
#include "zexpert/error.h"

namespace zexpert::cuda {

inline void check(cudaError_t status, const char* what) {
  ZEXPERT_CHECK(status == cudaSuccess, what, " failed: ", cudaGetErrorString(status));
}

/// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0;
  int value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int num_multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

/// Every kernel that launch() starts must call this before it accesses device memory. After it, writes of earlier
/// kernels in the stream are visible. Every thread must call it, so that the end of a kernel implies the end of all
/// kernels before it. Data written two launches back may be read earlier, but only through L2 (ld.cg). Do not use __ldg
/// in such kernels: it may be hoisted above the wait or read a stale cache.
__device__ __forceinline__ void wait_for_previous_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the next kernel of the stream start on multiprocessors that are free.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Whether the device runs code of `kernel` that was compiled for compute capability 9.0 or later. Other code, such as
/// PTX for older GPUs on a newer one, has no clusters and does not wait for the kernels before it.
template <typename... Parameters>
bool is_for_hopper_or_later(const char* name, void (*kernel)(Parameters...)) {
  cudaFuncAttributes code{};
  check(cudaFuncGetAttributes(&code, kernel), name);
  return code.ptxVersion >= 90;
}

/// Starts `kernel` on `stream` with blocks in clusters of `cluster_size`. Throws Error with `name` if that fails.
/// Returns false and starts nothing if the device has no room for a cluster, as a MIG part may not. Safe during stream
/// capture.
template <typename... Parameters>
bool launch_clusters(const char* name, void (*kernel)(Parameters...), int64_t num_blocks, int cluster_size,
                     int num_threads, size_t shared_memory_bytes, cudaStream_t stream, Parameters... arguments) {
  constexpr size_t kSharedMemoryWithoutAsking = 32 * 1024;  // of 48 KB; the rest is for the kernel's static memory
  if (shared_memory_bytes > kSharedMemoryWithoutAsking) {
    // The same limit for every launch if possible: another thread may launch the kernel with another size.
    constexpr size_t kStaticMemory = 16 * 1024;
    const auto most = static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) - kStaticMemory;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_memory_bytes > most ? shared_memory_bytes : most)),
          name);
  }
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(num_blocks));
  config.blockDim = dim3(static_cast<unsigned>(num_threads));
  config.dynamicSmemBytes = shared_memory_bytes;
  config.stream = stream;
  config.attrs = attributes;
  if (cluster_size > 1) {
    cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(cluster_size);
    cluster.val.clusterDim.y = 1;
    cluster.val.clusterDim.z = 1;
  }
  constexpr int kClusterWithoutAsking = 8;
  if (cluster_size > kClusterWithoutAsking) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), name);
    int num_clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&num_clusters, kernel, &config) != cudaSuccess || num_clusters == 0) {
      (void)cudaGetLastError();  // so that the next check does not see it
      return false;
    }
  }
  if (is_for_hopper_or_later(name, kernel)) {
    cudaLaunchAttribute& dependent_launch = attributes[config.numAttrs++];
    dependent_launch.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    dependent_launch.val.programmaticStreamSerializationAllowed = 1;
  }
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (cluster_size > 1 && (status == cudaErrorLaunchOutOfResources || status == cudaErrorInvalidClusterSize)) {
    (void)cudaGetLastError();
    return false;
  }
  check(status, name);
  return true;
}

/// The same without clusters.
template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), int64_t num_blocks, int num_threads,
            size_t shared_memory_bytes, cudaStream_t stream, Parameters... arguments) {
  launch_clusters(name, kernel, num_blocks, 1, num_threads, shared_memory_bytes, stream, arguments...);
}

/// A grid in which each block walks several units of work.
struct WalkingGrid {
  int64_t num_blocks;
  int units_per_block;  ///< at a time, each by its own threads
};

/// A grid for `num_units` units of work that `threads_per_unit` threads do. If it may not occupy all multiprocessors, a
/// block fills one: blocks of other kernels, which may need a whole one, then have the others.
inline WalkingGrid walking_grid(int64_t num_units, int threads_per_unit, int most_multiprocessors) {
  constexpr int kMostThreads = 1024;
  constexpr int kThreadsPerMultiprocessor = 1024;  // the registers suffice for as many
  const auto at_least_one = [](int64_t count) { return count < 1 ? 1 : count; };
  const bool fills = most_multiprocessors > 0;
  const int units_per_block = fills ? kMostThreads / threads_per_unit : 1;
  const int64_t most_blocks =
      fills ? most_multiprocessors : int64_t{num_multiprocessors()} * (kThreadsPerMultiprocessor / threads_per_unit);
  const int64_t needed = (num_units + units_per_block - 1) / units_per_block;
  return {at_least_one(needed < most_blocks ? needed : most_blocks), units_per_block};
}

/// The unit of work that this thread begins with in such a grid, and the step to its next one.
struct OwnUnits {
  int64_t first;
  int64_t step;
  int thread;  ///< of the unit
};
__device__ __forceinline__ OwnUnits own_units(int threads_per_unit) {
  const auto units_per_block = static_cast<int>(blockDim.x) / threads_per_unit;
  const auto unit = static_cast<int>(threadIdx.x) / threads_per_unit;
  return {int64_t{blockIdx.x} * units_per_block + unit, int64_t{gridDim.x} * units_per_block,
          static_cast<int>(threadIdx.x) % threads_per_unit};
}

}  // namespace zexpert::cuda
