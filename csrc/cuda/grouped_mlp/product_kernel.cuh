// SPDX-License-Identifier: Apache-2.0
// The two grouped products, one kernel template.
//
// A block per multiprocessor computes the schedule's items. One thread, the producer, finds them, passes each to the
// consumers, and fills a ring of stages in shared memory through the copy engine: a stage is a tile's weight rows and
// token rows, 64 elements of depth of each. Two warpgroups, the consumers, multiply them into registers and write the
// tile, while the producer loads the next one. A stage's `full` barrier ends its phase when the stage's bytes have
// arrived, its `empty` barrier when all 8 warps are done with them. Both sides walk the ring in the same order, and the
// parity flips once per round. Items pass through a ring of their own in the same way.
//
// Tall tiles read the fewest bytes for up to 160 rows of an expert. Wide tiles hold up to 288 rows, so that an expert
// with that many reads its weights once. Longer segments need several tiles either way, and tall ones read fewer bytes.
//
// A tile whose depth is divided (see Schedule) is summed by whichever of its blocks is the last to finish,
// always in the order of the parts: the result does not depend on which block that is. No block waits for another.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cuda/grouped_mlp/float8.cuh"
#include "cuda/grouped_mlp/layout.h"
#include "cuda/grouped_mlp/ptx.cuh"
#include "cuda/grouped_mlp/schedule.h"
#include "cuda/grouped_mlp/wgmma.cuh"
#include "cuda/launch.cuh"
#include "zexpert/grouped_mlp.h"

namespace zexpert::cuda {

/// Whether operands of type T have scales: a weight's for a block of channels and of depth, a row's for a block of
/// depth.
template <typename T>
inline constexpr bool kIsScaled = std::is_same_v<T, __nv_fp8_e4m3>;
/// The type of the results. Only the activation of scaled operands is of their type again.
template <typename T>
using ProductOutput = std::conditional_t<kIsScaled<T>, __nv_bfloat16, T>;

inline constexpr int kConsumerWarps = kWarpgroups * kWarpsPerWarpgroup;
inline constexpr int kConsumers = kConsumerWarps * kWarpSize;
inline constexpr int kProductThreads = kConsumers + kWarpsPerWarpgroup * kWarpSize;
// A multiprocessor's quarter has 512 registers for each lane of its three warps, two of which consume. Registers move
// between whole warpgroups, so the producer is a warpgroup too, with a single working thread.
template <typename T, int kMaxRows>
inline constexpr int kConsumerRegisters = kIsScaled<T> && kMaxRows > 128 ? 232 : 224;
template <typename T, int kMaxRows>
inline constexpr int kProducerRegisters = 504 - 2 * kConsumerRegisters<T, kMaxRows>;
inline constexpr int kConsumersBarrier = 1;
inline constexpr int kStagingPlaces = 3;
/// A block has parts of two tiles at most, the first and the last of its own.
inline constexpr int kPartsOfBlock = 2;

struct ProductArguments {
  CUtensorMap weights;
  CUtensorMap rows[kRowBoxes];  ///< boxes of 8, 16, 32, ... rows
  CUtensorMap row_scales;       ///< of scaled operands, as the three below
  const float* weight_scales;   ///< [num_experts, matrices * blocks of channels, num_steps]
  float* out_scales;            ///< of the activation: [blocks of channels, out_scales_stride]
  int64_t expert_scale_stride;
  int64_t out_scales_stride;
  const int32_t* expert_offsets;   ///< [num_experts + 1], within the rows there are
  const int32_t* row_tile_starts;  ///< [num_experts + 1]
  void* out;                       ///< [rows, num_channels]
  float* partial_sums;             ///< [kPartsOfBlock * blocks, kMostColumns, kConsumers], of divided tiles
  int32_t* arrivals;               ///< [blocks], zeros: parts written of the divided tile that begins in a block
  int32_t* tickets;                ///< 0: tiles that blocks have taken beyond the first of each
  int64_t out_row_stride;
  int num_experts;
  int num_channels;
  int num_steps;
  int max_rows_per_tile;  ///< at most kMaxRows
};

// With few rows per expert, reading weights bounds the time: blocks should end at the same time. Otherwise products do,
// and tiles should be whole.
ZEXPERT_HOST_DEVICE constexpr bool are_few(int max_rows) { return max_rows <= kHopperFewTileRows; }
inline constexpr int kRoundsToDivide = 8;
/// Items between the producer and the consumers.
inline constexpr int kItemPlaces = 2;

/// In shared memory, of scaled operands.
template <int kMaxRows, int kStages>
struct ScaleMemory {
  /// The copy engine's destinations begin at multiples of 128 bytes.
  alignas(128) float rows[kStages][round_up(kMaxRows, 128 / int{sizeof(float)})];
  float maxima[kConsumerWarps][kMaxRows];  ///< of a warp's activations, by row
  float inverse[kMaxRows];                 ///< of the activations' scales
};
struct NoScales {};

/// `kMaxRows` is the most rows that a tile's stage has room for, a multiple of kRowStep.
template <typename T, Tiles kTiles, int kMaxRows, int kStages>
struct ProductMemory {
  static constexpr int kWeightBytes = weight_bytes(kTiles);
  static constexpr int kStageBytes = kWeightBytes + kMaxRows * kLineBytes;
  /// Of a warpgroup's matrix instructions.
  static constexpr int kMostColumns = kMaxRows / row_parts(kTiles);
  static_assert(kStageBytes % kSwizzleBytes == 0 && kMaxRows < 2 * (kRowStep << (kRowBoxes - 1)));

  alignas(kSwizzleBytes) uint8_t stages[kStages][kStageBytes];  // two halves of the weights, then the rows
  alignas(16) uint8_t staging[kConsumerWarps][kStagingPlaces][kStagingBytes];
  std::conditional_t<kIsScaled<T>, ScaleMemory<kMaxRows, kStages>, NoScales> scales;
  WorkItem items[kItemPlaces];
  int32_t row_tile_starts[kHopperMaxExperts + 1];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  uint64_t item_full[kItemPlaces];
  uint64_t item_empty[kItemPlaces];
  int32_t num_arrived;
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <typename T>
__device__ __forceinline__ uint32_t packed(float low, float high);
template <>
__device__ __forceinline__ uint32_t packed<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t packed<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ float silu_and_mul_of(float gate, float up) {
  return __fdividef(gate, 1.0F + __expf(-gate)) * up;
}

/// The producer: one thread. In the down product it loads its first stages' weights before it waits for the kernel that
/// writes the rows.
template <typename T, Product kProduct, Tiles kTiles, int kMaxRows, int kStages>
__device__ __forceinline__ void load_tiles(const ProductArguments& arguments, const Schedule& schedule,
                                           ProductMemory<T, kTiles, kMaxRows, kStages>& memory) {
  constexpr int kDepth = step_depth(sizeof(T));
  constexpr int kScaleBytes = kIsScaled<T> ? kMaxRows * int{sizeof(float)} : 0;
  constexpr int kWeightBytes = weight_bytes(kTiles);
  RingPosition<kStages> ring;
  RingPosition<kItemPlaces> place;
  const auto hand_over = [&](const WorkItem& work) {
    ptx::barrier_wait(ptx::shared_address(&memory.item_empty[place.stage]), place.parity ^ 1U);
    memory.items[place.stage] = work;
    ptx::barrier_arrive(ptx::shared_address(&memory.item_full[place.stage]));
    place.advance();
  };
  const auto load_weights = [&](const WorkItem& work, int step, int to_stage) {
    const uint32_t full = ptx::shared_address(&memory.full[to_stage]);
    ptx::barrier_arrive_and_expect(
        full, static_cast<uint32_t>(kWeightBytes + kScaleBytes + round_up(work.num_rows, kRowStep) * kLineBytes));
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const WeightBox box = weight_box(kProduct, kTiles, work.expert, work.weight_tile, half, step * kDepth);
      const auto& c = box.coordinates;
      ptx::load_box_5d(ptx::shared_address(memory.stages[to_stage]) + static_cast<uint32_t>(half * half_bytes(kTiles)),
                       arguments.weights, full, c[0], c[1], c[2], c[3], c[4]);
    }
  };
  // Blocks of all weight tiles read the rows: keep them in the L2 cache while weights pass through.
  const uint64_t rows_policy = are_few(kMaxRows) ? ptx::evict_normal() : ptx::evict_last();
  const auto load_rows = [&](const WorkItem& work, int step, int to_stage) {
    const uint32_t to = ptx::shared_address(memory.stages[to_stage]) + static_cast<uint32_t>(kWeightBytes);
    for_each_row_box(round_up(work.num_rows, kRowStep), [&](int box, int line) {
      ptx::load_box_2d(to + static_cast<uint32_t>(line * kLineBytes), arguments.rows[box],
                       ptx::shared_address(&memory.full[to_stage]), rows_policy, step * kDepth, work.first_row + line);
    });
    if constexpr (kIsScaled<T>) {
      ptx::load_box_2d(ptx::shared_address(memory.scales.rows[to_stage]), arguments.row_scales,
                       ptx::shared_address(&memory.full[to_stage]), rows_policy, work.first_scale, step);
    }
  };
  bool may_read_rows = false;
  const auto wait_for_rows = [&] {
    wait_for_previous_kernels();
    ptx::fence_async_proxy();  // the kernel before wrote the rows by ordinary stores
    may_read_rows = true;
  };
  // Tiles differ in rows, and so in time. Blocks fetch tiles in turn: tiles that share rows or weights are then
  // computed at the same time, while the L2 cache holds what they share. With a fixed series, blocks would drift apart.
  const auto take_ticket = [&] { return atomicAdd(arguments.tickets, 1); };
  for_each_item(schedule, static_cast<int>(blockIdx.x), take_ticket, [&](const WorkItem& work) {
    hand_over(work);
    int step = work.first_step;
    if (!may_read_rows) {
      const int last_ahead = min(work.last_step, step + kStages);
      for (int ahead = step; ahead < last_ahead; ++ahead) load_weights(work, ahead, ahead - step);
      wait_for_rows();
      for (; step < last_ahead; ++step) {
        load_rows(work, step, ring.stage);
        ring.advance();
      }
    }
    for (; step < work.last_step; ++step) {
      ptx::barrier_wait(ptx::shared_address(&memory.empty[ring.stage]), ring.parity ^ 1U);
      load_weights(work, step, ring.stage);
      load_rows(work, step, ring.stage);
      ring.advance();
    }
  });
  if (!may_read_rows)
    wait_for_rows();
  hand_over(WorkItem{});
}

/// Returns the value and shows the compiler that it is the same in the whole warp: descriptors are uniform registers.
__device__ __forceinline__ uint32_t warp_value(uint32_t value) { return __shfl_sync(kFullMask, value, 0); }

/// Reports that a warp is done with the stage that `empty` belongs to.
__device__ __forceinline__ void release_stage(uint32_t empty) {
  if (threadIdx.x % kWarpSize == 0)
    ptx::barrier_arrive(empty);
}

/// sums[half] += 64 weight rows of that half, from line `first_weight` on, times kColumns rows, from `first_row` on,
/// over `num_steps` stages of the ring.
template <typename T, int kColumns, Tiles kTiles, int kMaxRows, int kStages>
__device__ __forceinline__ void multiply(float (&sums)[kHalves][kColumns / 2], int num_steps, int first_weight,
                                         int first_row, ProductMemory<T, kTiles, kMaxRows, kStages>& memory,
                                         RingPosition<kStages>& ring) {
  uint32_t previous_empty = 0;
#pragma unroll 1
  for (int step = 0; step < num_steps; ++step) {
    ptx::barrier_wait(ptx::shared_address(&memory.full[ring.stage]), ring.parity);
    const uint32_t stage = ptx::shared_address(memory.stages[ring.stage]);
    const uint32_t weights = stage + static_cast<uint32_t>(first_weight * kLineBytes);
    const uint64_t first_half = matrix_descriptor(weights);
    const uint64_t second_half = matrix_descriptor(weights + half_bytes(kTiles));
    const uint64_t rows =
        matrix_descriptor(stage + static_cast<uint32_t>(weight_bytes(kTiles) + first_row * kLineBytes));
    ptx::wgmma_fence();
#pragma unroll
    for (uint64_t i = 0; i < kInstructionsPerStep; ++i) {
      Wgmma<T, kColumns>::add(sums[0], first_half + i * kDescriptorStep, rows + i * kDescriptorStep);
      Wgmma<T, kColumns>::add(sums[1], second_half + i * kDescriptorStep, rows + i * kDescriptorStep);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (step > 0)
      release_stage(previous_empty);
    previous_empty = ptx::shared_address(&memory.empty[ring.stage]);
    ring.advance();
  }
  ptx::wgmma_wait<0>();
  release_stage(previous_empty);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (float& sum : sums[half]) ptx::pin(sum);
  }
}

/// Where a warpgroup's weights have their scales: one for each step. Gate rows and up rows have different ones.
struct WeightScales {
  const float* gate;
  const float* up;  ///< in the down product the same
};

template <Product kProduct, Tiles kTiles>
__device__ __forceinline__ WeightScales weight_scales(const ProductArguments& arguments, const WorkItem& work,
                                                      int warpgroup) {
  constexpr int kBlock = static_cast<int>(kScaleBlock);
  const int block = first_channel(kProduct, kTiles, work.weight_tile, warpgroup, 0) / kBlock;
  const int num_blocks = (arguments.num_channels + kBlock - 1) / kBlock;
  // The last tile of the down product may have no channels for a warpgroup.
  const float* const first = arguments.weight_scales + work.expert * arguments.expert_scale_stride +
                             int64_t{min(block, num_blocks - 1)} * arguments.num_steps;
  return {first, kProduct == Product::kGateUp ? first + int64_t{num_blocks} * arguments.num_steps : first};
}

/// sums[half] += 64 weight rows of that half, from line `first_weight` on, times kColumns rows, over the steps of
/// `work`. The matrix instructions sum the products of a step and half of the weight rows. These are scaled and added
/// in float32 while the other warpgroup's instructions run.
template <typename T, int kColumns, Tiles kTiles, int kMaxRows, int kStages>
__device__ __forceinline__ void multiply_scaled(float (&sums)[kHalves][kColumns / 2], const WeightScales& scales,
                                                const WorkItem& work, int first_weight,
                                                ProductMemory<T, kTiles, kMaxRows, kStages>& memory,
                                                RingPosition<kStages>& ring) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int first_column = lane % 4 * 2;
  float gate_scale = scales.gate[work.first_step];
  float up_scale = scales.up[work.first_step];
#pragma unroll 1
  for (int step = work.first_step; step < work.last_step; ++step) {
    const int next = min(step + 1, work.last_step - 1);
    const float next_gate_scale = scales.gate[next];
    const float next_up_scale = scales.up[next];
    ptx::barrier_wait(ptx::shared_address(&memory.full[ring.stage]), ring.parity);
    const uint32_t stage = ptx::shared_address(memory.stages[ring.stage]);
    const uint32_t weights = warp_value(stage + static_cast<uint32_t>(first_weight * kLineBytes));
    const uint32_t rows = warp_value(stage + static_cast<uint32_t>(weight_bytes(kTiles)));
    const float* const row_scales = memory.scales.rows[ring.stage] + first_column;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      float products[kColumns / 2];
      const uint64_t a = matrix_descriptor(weights + half * half_bytes(kTiles));
      const uint64_t b = matrix_descriptor(rows);
      ptx::wgmma_fence();
      Wgmma<T, kColumns>::start(products, a, b);
#pragma unroll
      for (uint64_t i = 1; i < kInstructionsPerStep; ++i)
        Wgmma<T, kColumns>::add(products, a + i * kDescriptorStep, b + i * kDescriptorStep);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
#pragma unroll
      for (float& product : products) ptx::pin(product);
#pragma unroll
      for (int j = 0; j < kColumns / kRowStep; ++j) {
        const float2 scale = *reinterpret_cast<const float2*>(row_scales + j * kRowStep);
        float* const to = sums[half] + 4 * j;
        to[0] = fmaf(products[4 * j], gate_scale * scale.x, to[0]);
        to[1] = fmaf(products[4 * j + 1], gate_scale * scale.y, to[1]);
        to[2] = fmaf(products[4 * j + 2], up_scale * scale.x, to[2]);
        to[3] = fmaf(products[4 * j + 3], up_scale * scale.y, to[3]);
      }
    }
    __syncwarp();
    release_stage(ptx::shared_address(&memory.empty[ring.stage]));
    ring.advance();
    gate_scale = next_gate_scale;
    up_scale = next_up_scale;
  }
}

/// Activates a tile's gate and up sums, a block of channels, and writes it in float8 with a scale for each row: its
/// largest magnitude over the largest of the type.
template <typename T, int kColumns, Tiles kTiles, int kMaxRows, int kStages>
__device__ __forceinline__ void write_quantised(float (&sums)[kHalves][kColumns / 2], const ProductArguments& arguments,
                                                const WorkItem& work,
                                                ProductMemory<T, kTiles, kMaxRows, kStages>& memory) {
  static_assert(tile_channels(Product::kGateUp, kTiles) == kScaleBlock && row_parts(kTiles) == 1);
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;

  // Activate, and find the rows' maxima. The activation replaces the gate's sums.
#pragma unroll
  for (int j = 0; j < kColumns / kRowStep; ++j) {
    float most[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (auto& x : sums) x[4 * j + i] = silu_and_mul_of(x[4 * j + i], x[4 * j + i + 2]);
      most[i] = fmaxf(fabsf(sums[0][4 * j + i]), fabsf(sums[1][4 * j + i]));
#pragma unroll
      for (int offset = 4; offset < kWarpSize; offset *= 2)
        most[i] = fmaxf(most[i], __shfl_xor_sync(kFullMask, most[i], offset));
    }
    if (lane < 4)
      *reinterpret_cast<float2*>(&memory.scales.maxima[warp][j * kRowStep + 2 * lane]) = {most[0], most[1]};
  }
  ptx::named_barrier_sync(kConsumersBarrier, kConsumers);
  for (int row = static_cast<int>(threadIdx.x); row < kColumns; row += kConsumers) {
    float most = memory.scales.maxima[0][row];
#pragma unroll
    for (int other = 1; other < kConsumerWarps; ++other) most = fmaxf(most, memory.scales.maxima[other][row]);
    const float scale = float8_scale(most);
    memory.scales.inverse[row] = 1.0F / scale;
    if (row < work.num_rows)
      arguments.out_scales[work.weight_tile * arguments.out_scales_stride + work.first_scale + row] = scale;
  }
  ptx::named_barrier_sync(kConsumersBarrier, kConsumers);

  // Write 32 rows of the warp's 16 channels at a time. A 16-bit element of the transposed matrices is a channel of the
  // first half and one of the second.
  const int channel =
      first_channel(Product::kGateUp, kTiles, work.weight_tile, warp / kWarpsPerWarpgroup, warp % kWarpsPerWarpgroup);
  if (channel >= arguments.num_channels)
    return;
  auto* const out = static_cast<uint8_t*>(arguments.out) + work.first_row * arguments.out_row_stride + channel;
  const uint32_t staging = ptx::shared_address(memory.staging[warp]) + static_cast<uint32_t>(lane * 16);
#pragma unroll
  for (int begin = 0; begin < kColumns; begin += kWarpSize) {
    uint32_t matrices[4] = {};
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int j = begin / kRowStep + m;
      if (j * kRowStep >= kColumns)
        continue;
      const float2 inverse = *reinterpret_cast<const float2*>(&memory.scales.inverse[j * kRowStep + lane % 4 * 2]);
      matrices[m] = packed_float8(sums[0][4 * j] * inverse.x, sums[1][4 * j] * inverse.x) |
                    packed_float8(sums[0][4 * j + 1] * inverse.y, sums[1][4 * j + 1] * inverse.y) << 16;
    }
    ptx::store_transposed(staging, matrices);
    __syncwarp();
    const uint4 pairs = ptx::load_shared(staging);
    __syncwarp();
    if (begin + lane < work.num_rows) {
      constexpr unsigned kFirstHalf = 0x6420;
      constexpr unsigned kSecondHalf = 0x7531;
      *reinterpret_cast<uint4*>(out + (begin + lane) * arguments.out_row_stride) = {
          __byte_perm(pairs.x, pairs.y, kFirstHalf), __byte_perm(pairs.z, pairs.w, kFirstHalf),
          __byte_perm(pairs.x, pairs.y, kSecondHalf), __byte_perm(pairs.z, pairs.w, kSecondHalf)};
    }
  }
}

/// Writes this block's part of a divided tile. In the block that finishes last it returns true, and the sums of all
/// parts.
template <typename T, Tiles kTiles, int kMaxRows, int kStages, int kSums>
__device__ __forceinline__ bool add_parts(float (&sums)[kHalves][kSums], const ProductArguments& arguments,
                                          const WorkItem& work, ProductMemory<T, kTiles, kMaxRows, kStages>& memory) {
  // The first part of a tile is the last that its block has, any other the first.
  const auto at = [&](int part, int half, int i) {
    constexpr int kMostColumns = ProductMemory<T, kTiles, kMaxRows, kStages>::kMostColumns;
    const int64_t place = int64_t{kPartsOfBlock} * (work.first_block + part) + (part == 0 ? 1 : 0);
    return arguments.partial_sums + (place * kMostColumns + half * kSums + i) * kConsumers + threadIdx.x;
  };
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) *at(work.part, half, i) = sums[half][i];
  }
  __threadfence();
  ptx::named_barrier_sync(kConsumersBarrier, kConsumers);
  if (threadIdx.x == 0)
    memory.num_arrived = atomicAdd(arguments.arrivals + work.first_block, 1) + 1;
  ptx::named_barrier_sync(kConsumersBarrier, kConsumers);
  if (memory.num_arrived != work.num_parts)
    return false;
  __threadfence();
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
#pragma unroll
    for (float& sum : sums[half]) sum = 0.0F;
  }
#pragma unroll 1
  for (int part = 0; part < work.num_parts; ++part) {
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[half][i] += __ldcg(at(part, half, i));
    }
  }
  return true;
}

/// Writes a warp's channels of the tile's rows to `out`, which points to the first of them.
template <typename T, Product kProduct, int kColumns>
__device__ __forceinline__ void write_rows(const float (&sums)[kHalves][kColumns / 2], T* out, int64_t row_stride,
                                           int num_rows, uint8_t (&staging)[kStagingPlaces][kStagingBytes]) {
  using Turn = OutputTurn<kProduct>;
  constexpr int kTurns = (kColumns + Turn::kRows - 1) / Turn::kRows;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const uint32_t store_address = ptx::shared_address(staging) + Turn::store_offset(lane);
  const uint32_t load_address = ptx::shared_address(staging) + Turn::load_offset(lane);
  const int row = Turn::row(lane);
  T* const first = out + row * row_stride + Turn::channel(lane);
#pragma unroll
  for (int begin = 0; begin < kTurns; begin += kStagingPlaces) {
#pragma unroll
    for (int turn = begin; turn < min(begin + kStagingPlaces, kTurns); ++turn) {
      uint32_t matrices[4] = {};
#pragma unroll
      for (int group = 0; group < Turn::kRows / 8; ++group) {
        const int s = 4 * (turn * (Turn::kRows / 8) + group);
        if (s >= kColumns / 2)
          continue;
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          const auto& x = sums[half];
          if constexpr (kProduct == Product::kGateUp) {
            matrices[2 * group + half] =
                packed<T>(silu_and_mul_of(x[s], x[s + 2]), silu_and_mul_of(x[s + 1], x[s + 3]));
          } else {
            matrices[2 * half] = packed<T>(x[s], x[s + 1]);
            matrices[2 * half + 1] = packed<T>(x[s + 2], x[s + 3]);
          }
        }
      }
      ptx::store_transposed(store_address + (turn - begin) * kStagingBytes, matrices);
    }
    __syncwarp();
    uint4 words[kStagingPlaces];
#pragma unroll
    for (int turn = begin; turn < min(begin + kStagingPlaces, kTurns); ++turn) {
      words[turn - begin] = ptx::load_shared(load_address + (turn - begin) * kStagingBytes);
    }
    __syncwarp();
#pragma unroll
    for (int turn = begin; turn < min(begin + kStagingPlaces, kTurns); ++turn) {
      if (turn * Turn::kRows + row < num_rows)
        *reinterpret_cast<uint4*>(first + turn * Turn::kRows * row_stride) = words[turn - begin];
    }
  }
}

/// A consumer's work on one item of kColumns columns.
template <typename T, Product kProduct, int kColumns, Tiles kTiles, int kMaxRows, int kStages>
__device__ __forceinline__ void compute_tile(const ProductArguments& arguments, const WorkItem& work,
                                             const PartRows& rows, ProductMemory<T, kTiles, kMaxRows, kStages>& memory,
                                             RingPosition<kStages>& ring) {
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warpgroup = warp / kWarpsPerWarpgroup;
  const int first_weight = warpgroup % weight_parts(kTiles) * kInstructionRows;
  float sums[kHalves][kColumns / 2] = {};
  if constexpr (kIsScaled<T>) {
    const WeightScales scales = weight_scales<kProduct, kTiles>(arguments, work, warpgroup);
    multiply_scaled<T, kColumns>(sums, scales, work, first_weight, memory, ring);
  } else {
    multiply<T, kColumns>(sums, work.last_step - work.first_step, first_weight, rows.first_row, memory, ring);
  }
  if (work.num_parts > 1 && !add_parts(sums, arguments, work, memory))
    return;
  if constexpr (kIsScaled<T> && kProduct == Product::kGateUp) {
    write_quantised<T, kColumns>(sums, arguments, work, memory);
    return;
  }
  const int channel = first_channel(kProduct, kTiles, work.weight_tile, warpgroup, warp % kWarpsPerWarpgroup);
  if (channel < arguments.num_channels) {
    const int64_t first_row = work.first_row + rows.first_row;
    using Out = ProductOutput<T>;
    Out* const out = static_cast<Out*>(arguments.out) + first_row * arguments.out_row_stride + channel;
    write_rows<Out, kProduct, kColumns>(sums, out, arguments.out_row_stride, rows.num_rows, memory.staging[warp]);
  }
}

/// Calls `fn` with `columns`, a multiple of kRowStep up to kMost, as an integral_constant.
template <int kMost, typename Fn>
__device__ __forceinline__ void visit_columns(int columns, const Fn& fn) {
  if constexpr (kMost > kRowStep) {
    if (columns < kMost)
      return visit_columns<kMost - kRowStep>(columns, fn);
  }
  fn(std::integral_constant<int, kMost>{});
}

template <typename T, Product kProduct, Tiles kTiles, int kMaxRows, int kStages>
__device__ __forceinline__ void compute_tiles(const ProductArguments& arguments,
                                              ProductMemory<T, kTiles, kMaxRows, kStages>& memory) {
  const int warpgroup = static_cast<int>(threadIdx.x) / (kWarpsPerWarpgroup * kWarpSize);
  const int part = warpgroup / weight_parts(kTiles);
  RingPosition<kStages> ring;
  RingPosition<kItemPlaces> place;
  while (true) {
    ptx::barrier_wait(ptx::shared_address(&memory.item_full[place.stage]), place.parity);
    const WorkItem& work = memory.items[place.stage];  // not in registers: there are few
    if (work.num_rows == 0)
      return;
    const PartRows rows = rows_of_part(work.num_rows, part, row_parts(kTiles));
    visit_columns<ProductMemory<T, kTiles, kMaxRows, kStages>::kMostColumns>(rows.num_columns, [&](auto columns) {
      compute_tile<T, kProduct, columns.value>(arguments, work, rows, memory, ring);
    });
    ptx::barrier_arrive(ptx::shared_address(&memory.item_empty[place.stage]));
    place.advance();
  }
}

#endif  // __CUDA_ARCH_FEAT_SM90_ALL

template <typename T, Product kProduct, Tiles kTiles, int kMaxRows, int kStages>
__global__ void __launch_bounds__(kProductThreads, 1)
    grouped_product(const __grid_constant__ ProductArguments arguments) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using Memory = ProductMemory<T, kTiles, kMaxRows, kStages>;
  extern __shared__ uint8_t unaligned_memory[];
  const uint32_t misaligned = ptx::shared_address(unaligned_memory) % kSwizzleBytes;
  Memory& memory = *reinterpret_cast<Memory*>(unaligned_memory + (misaligned == 0 ? 0 : kSwizzleBytes - misaligned));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) {
      ptx::barrier_init(ptx::shared_address(&memory.full[stage]), 1);
      ptx::barrier_init(ptx::shared_address(&memory.empty[stage]), kConsumerWarps);
    }
    for (int place = 0; place < kItemPlaces; ++place) {
      ptx::barrier_init(ptx::shared_address(&memory.item_full[place]), 1);
      ptx::barrier_init(ptx::shared_address(&memory.item_empty[place]), kConsumers);
    }
    ptx::fence_barrier_init();
  }
  if (threadIdx.x == kConsumers) {
    ptx::prefetch_tensor_map(arguments.weights);
    for (const CUtensorMap& map : arguments.rows) ptx::prefetch_tensor_map(map);
    if constexpr (kIsScaled<T>)
      ptx::prefetch_tensor_map(arguments.row_scales);
  }
  // When the down product starts, only the gate and up product may still be running, and that has waited for all before
  // it: the tile plan and the weights are in memory, and weights are loaded before the rows are written.
  if constexpr (kProduct == Product::kGateUp)
    wait_for_previous_kernels();
  for (int i = static_cast<int>(threadIdx.x); i <= arguments.num_experts; i += kProductThreads) {
    memory.row_tile_starts[i] = load_older(arguments.row_tile_starts + i);
  }
  __syncthreads();

  if (threadIdx.x < kConsumers) {
    wait_for_previous_kernels();  // which the gate and up product has
    let_next_kernel_start();
    ptx::raise_registers<kConsumerRegisters<T, kMaxRows>>();
    compute_tiles<T, kProduct>(arguments, memory);
  } else {
    ptx::lower_registers<kProducerRegisters<T, kMaxRows>>();
    if (threadIdx.x == kConsumers) {
      constexpr int kChannels = tile_channels(kProduct, kTiles);
      Schedule schedule{};
      schedule.expert_offsets = arguments.expert_offsets;
      schedule.row_tile_starts = memory.row_tile_starts;  // in shared memory: it is searched
      schedule.num_experts = arguments.num_experts;
      schedule.num_weight_tiles = (arguments.num_channels + kChannels - 1) / kChannels;
      schedule.num_steps = arguments.num_steps;
      schedule.num_blocks = static_cast<int>(gridDim.x);
      schedule.rounds_to_divide = are_few(kMaxRows) ? kRoundsToDivide : 1;
      load_tiles<T, kProduct>(arguments, schedule, memory);
    }
  }
#else
  __trap();  // wgmma is in code for sm_90a alone, and the launcher checks for that
#endif
}

}  // namespace zexpert::cuda
