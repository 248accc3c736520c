// SPDX-License-Identifier: Apache-2.0
// router_logits on Hopper: hidden states and weights as float16 numbers, and the ring of stages that its kernels walk.
// See router_logits_layout.h. Only for code compiled for sm_90a.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/grouped_mlp/ptx.cuh"
#include "cuda/reduce.cuh"
#include "cuda/router_logits_layout.h"

namespace zexpert::cuda::router {

inline constexpr int kWarpgroupThreads = 4 * kWarpSize;
// Registers are moved between whole warpgroups, so a producer is one, with a single thread at work.
inline constexpr int kProducerRegisters = 24;

/// A place in a ring. A stage's `full` barrier ends its phase when the stage's bytes are there, its `empty` barrier
/// when all warps that read them are done. All walk the ring in the same order, and the parity flips once per round.
template <int kStages>
struct Place {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1U;
    }
  }
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

__device__ __forceinline__ uint32_t misalignment(const void* memory) {
  return (kSwizzleBytes - ptx::shared_address(memory) % kSwizzleBytes) % kSwizzleBytes;
}

__device__ __forceinline__ uint32_t word(const __half2& pair) { return *reinterpret_cast<const uint32_t*>(&pair); }

/// The elementwise larger of two pairs' magnitudes, as bfloat16. Loses NaN, which stays in the hidden states.
__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
  const __nv_bfloat162 result = __hmax2(__habs2(*reinterpret_cast<const __nv_bfloat162*>(&a)),
                                        __habs2(*reinterpret_cast<const __nv_bfloat162*>(&b)));
  return *reinterpret_cast<const uint32_t*>(&result);
}

/// Two bfloat16 hidden states times a power of two, as float16.
__device__ __forceinline__ uint32_t scaled_tokens(uint32_t pair, float scale) {
  return word(__floats2half2_rn(__uint_as_float(pair << 16U) * scale, __uint_as_float(pair & 0xffff0000U) * scale));
}

struct SplitWeights {
  uint32_t high;
  uint32_t low;
};

/// Two weights times a power of two, as sums of two float16 numbers.
__device__ __forceinline__ SplitWeights split(float2 pair, float scale) {
  pair = make_float2(pair.x * scale, pair.y * scale);
  const __half2 high = __floats2half2_rn(pair.x, pair.y);
  const float2 value = __half22float2(high);
  return {word(high), word(__floats2half2_rn(pair.x - value.x, pair.y - value.y))};
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

}  // namespace zexpert::cuda::router
