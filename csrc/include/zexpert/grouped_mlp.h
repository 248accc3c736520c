// SPDX-License-Identifier: Apache-2.0
// grouped_mlp: each expert's feed-forward network over its segment of rows.
#pragma once

#include <cstdint>

#include "zexpert/cpu_capability.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// Largest segment that grouped_mlp_cpu is the faster way for: it streams an expert's weights, and a matrix-product
/// library's packing pays off only above. Measured crossovers against torch (oneDNN, MKL): about 160 rows in float32
/// with AVX-512 and 32 without, 48 in float16, 13 in bfloat16 where the processor has matrix units (AMX). In bfloat16
/// without AMX this kernel led up to the 64 rows tried.
inline int64_t few_rows_limit(ScalarType type, CpuCapability capability) {
  switch (type) {
    case ScalarType::kFloat32: return capability == CpuCapability::kAvx512 ? 160 : 32;
    case ScalarType::kFloat16: return 48;
    case ScalarType::kBFloat16: return has_amx_bf16() ? 12 : 64;
    default: return 16;
  }
}

/// For every expert e with expert_offsets[e + 1] - expert_offsets[e] in [1, max_rows], for its rows r:
///   out[r] = (silu(rows[r] @ gate_e.T) * (rows[r] @ up_e.T)) @ down_e.T,  [gate_e; up_e] = w13[e], down_e = w2[e].
/// Sums in float32 (float64 for float64 data); the activation stays in that type and the result is rounded once.
/// Rows of other experts and rows past the last offset are neither read nor written. With row_slots, rows[r] stands for
/// tokens[row_slots[r] / top_k].
/// Strides count elements.
struct GroupedMlpParams {
  const void* rows = nullptr;  ///< [num_rows, hidden_size], with row_slots [num_tokens, hidden_size]; unit inner stride
  const int32_t* expert_offsets = nullptr;  ///< [num_experts + 1]; from 0, ascending, at most num_rows
  const void* w13_weight = nullptr;         ///< [num_experts, 2 * intermediate_size, hidden_size]; inner two contiguous
  const void* w2_weight = nullptr;          ///< [num_experts, hidden_size, intermediate_size]; inner two contiguous
  void* out = nullptr;                      ///< [num_rows, hidden_size]; unit inner stride
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_rows = 0;
  int64_t num_experts = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t rows_row_stride = 0;
  int64_t out_row_stride = 0;
  int64_t w13_expert_stride = 0;
  int64_t w2_expert_stride = 0;
  int64_t max_rows = INT64_MAX;        ///< segments with more rows are left to the caller
  const int32_t* row_slots = nullptr;  ///< null, or [num_rows]; in [0, num_tokens * top_k) below the last offset
  int64_t num_tokens = 0;
  int64_t top_k = 1;
};

/// Throws Error, before anything is written, if expert_offsets is not an ascending sequence from 0 to at most num_rows,
/// or an entry of row_slots is out of range.
void grouped_mlp_cpu(const GroupedMlpParams& params);

// Sizes that grouped_mlp_hopper takes.
inline constexpr int64_t kHopperSizeStep = 64;  ///< hidden_size and intermediate_size are multiples of this
inline constexpr int64_t kHopperMaxExperts = 1024;
// The tiles that grouped_mlp_hopper cuts its products into: weight rows by at most so many rows of a segment.
inline constexpr int64_t kHopperFewTileRows = 64;    ///< with 256 weight rows, and more of them on their way
inline constexpr int64_t kHopperTallTileRows = 160;  ///< with 256 weight rows
inline constexpr int64_t kHopperMaxTileRows = 288;   ///< with 128 weight rows

/// The most rows of a tile. Few rows per expert are bound by reading the weights, many by the products; either way a
/// segment should be one tile, whose weights are then read once. Segments too long for that have tall tiles again,
/// which need fewer bytes for their products. `num_rows` counts the rows that do no work too, since the host does not
/// know how many do.
inline int64_t hopper_tile_rows(int64_t num_rows, int64_t num_experts) {
  constexpr int64_t kFewRows = 48;
  constexpr int64_t kManyRows = 200;
  constexpr int64_t kTooManyRows = 560;
  if (num_rows <= kFewRows * num_experts)
    return kHopperFewTileRows;
  const bool fits_wide = num_rows > kManyRows * num_experts && num_rows <= kTooManyRows * num_experts;
  return fits_wide ? kHopperMaxTileRows : kHopperTallTileRows;
}

/// What grouped_mlp_hopper computes from, and where.
struct GroupedMlpHopperParams {
  /// bfloat16 or float16; sizes as above; pointers aligned to 16 bytes, strides multiples of 8; pointers to device
  /// memory. Offsets that do not ascend within the rows give segments without rows. max_rows and row_slots are not
  /// looked at.
  GroupedMlpParams mlp;
  int64_t tile_rows = 0;      ///< a multiple of 8 up to kHopperMaxTileRows; 0: hopper_tile_rows chooses
  void* workspace = nullptr;  ///< grouped_mlp_hopper_workspace_bytes of device memory, aligned to 256 bytes
};

/// Whether the current device is a GPU of compute capability 9.0, and this library was compiled for sm_90a.
bool runs_grouped_mlp_hopper();

/// Bytes of device memory that grouped_mlp_hopper works in on the current device: the activation, [num_rows,
/// intermediate_size], and little else.
int64_t grouped_mlp_hopper_workspace_bytes(const GroupedMlpHopperParams& params);

/// The same as grouped_mlp_cpu for all segments, on the current device, a GPU of compute capability 9.0. The activation
/// is rounded to the data's type. The same bits in every run; bits of a row may depend on how many rows other experts
/// have. Throws Error, before anything is written, for a device, type, size or alignment that it does not take.
void grouped_mlp_hopper(const GroupedMlpHopperParams& params, cudaStream_t stream);

}  // namespace zexpert
