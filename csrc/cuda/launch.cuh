// SPDX-License-Identifier: Apache-2.0
// How kernels are launched: every launch is checked, and on Hopper and later a kernel may start while the one before it
// in the stream still runs (programmatic dependent launch).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "zexpert/error.h"

namespace zexpert::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullMask = 0xffffffffU;

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

/// Every kernel that launch() starts calls it before it touches device memory: what earlier kernels of the stream wrote
/// is visible after it. Every thread that a block's end waits for calls it, so that a kernel's end implies the end of
/// all before it. Only what the kernel before has waited for by itself may be read earlier, past the first-level cache.
/// Loads that may be hoisted above it or served from a stale read-only cache (__ldg) have no place in such kernels.
__device__ __forceinline__ void wait_for_previous_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// From here on the next kernel of the stream may take the multiprocessors that this one leaves free.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Whether a row does work; `last_offset` is in device memory, or null: all rows do.
__device__ __forceinline__ bool does_work(const int32_t* last_offset, int64_t row) {
  return last_offset == nullptr || row < *last_offset;
}

/// The sum of every lane's value; the same bits in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

/// The sum of the values of the block's threads before this one. All of them call it; `warp_sums` is shared memory for
/// a number per warp.
__device__ __forceinline__ int block_exclusive_sum(int value, int* warp_sums) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int sum = value;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int before = __shfl_up_sync(kFullMask, sum, offset);
    sum += lane >= offset ? before : 0;
  }
  if (lane == kWarpSize - 1)
    warp_sums[warp] = sum;
  __syncthreads();
  int base = 0;
  for (int other = 0; other < warp; ++other) base += warp_sums[other];
  return base + sum - value;
}

/// Whether the device runs code of `kernel` that was compiled for compute capability 9.0 or later. Otherwise, as where
/// a newer GPU compiles PTX for older ones, the kernel knows no clusters and does not wait for the kernels before it.
template <typename... Parameters>
bool is_for_hopper_or_later(const char* name, void (*kernel)(Parameters...)) {
  cudaFuncAttributes code{};
  check(cudaFuncGetAttributes(&code, kernel), name);
  return code.ptxVersion >= 90;
}

/// Starts `kernel` on `stream`, its blocks in clusters of `cluster_size`; throws Error, naming `name`, if that fails.
/// Returns false, and starts nothing, if the device has no room for a cluster, as a part of a GPU may not. Safe while
/// the stream is being captured.
template <typename... Parameters>
bool launch_clusters(const char* name, void (*kernel)(Parameters...), int64_t num_blocks, int cluster_size,
                     int num_threads, size_t shared_memory_bytes, cudaStream_t stream, Parameters... arguments) {
  constexpr size_t kSharedMemoryWithoutAsking = 32 * 1024;  // of 48 KB; the rest is for the kernel's static memory
  if (shared_memory_bytes > kSharedMemoryWithoutAsking) {
    // The same for every launch of the kernel, where it can be: another thread may launch it with another size.
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

}  // namespace zexpert::cuda
