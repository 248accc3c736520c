// SPDX-License-Identifier: Apache-2.0
// grouped_mlp: each expert's feed-forward network over its segment of rows.
#pragma once

#include <cstdint>

#include "zexpert/check_params.h"
#include "zexpert/cpu_capability.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"
#include "zexpert/scale_blocks.h"

namespace zexpert {

/// For every expert e and each of its rows r, expert_offsets[e] <= r < expert_offsets[e + 1]:
///   out[r] = (silu(rows[r] @ gate_e.T) * (rows[r] @ up_e.T)) @ down_e.T,  [gate_e; up_e] = w13[e], down_e = w2[e].
/// Sums in float32 (float64 for float64 data). Rows past the last offset are neither read nor written. With row_slots,
/// `rows` are tokens, and row r is token row_slots[r] / top_k. With scales, weights are float8_e4m3fn (1 sign, 4
/// exponent and 3 mantissa bits, no infinity), and a weight's value is itself times the scale of its block.
/// Strides count elements. All pointers are to memory of the device that computes.
struct GroupedMlpParams {
  const void* rows = nullptr;  ///< [num_rows, hidden_size], with row_slots [num_tokens, hidden_size]; unit inner stride
  const int32_t* expert_offsets = nullptr;  ///< [num_experts + 1]; from 0, ascending, at most num_rows
  const int32_t* row_slots = nullptr;       ///< null, or [num_rows]; in [0, num_tokens * top_k) below the last offset
  const void* w13_weight = nullptr;         ///< [num_experts, 2 * intermediate_size, hidden_size]; inner two contiguous
  const void* w2_weight = nullptr;          ///< [num_experts, hidden_size, intermediate_size]; inner two contiguous
  /// Null, or [num_experts, 2 * num_scale_blocks(intermediate_size), num_scale_blocks(hidden_size)], inner two
  /// contiguous: the scales of w13_weight, gate's blocks first, then up's. Not negative, finite.
  const float* w13_scale_inv = nullptr;
  /// Null, or [num_experts, num_scale_blocks(hidden_size), num_scale_blocks(intermediate_size)]; likewise.
  const float* w2_scale_inv = nullptr;
  void* out = nullptr;                          ///< [num_rows, hidden_size]; unit inner stride
  ScalarType data_type = ScalarType::kFloat32;  ///< of rows and out, and of weights without scales
  int64_t num_rows = 0;
  int64_t num_tokens = 0;  ///< with row_slots
  int64_t top_k = 1;       ///< with row_slots
  int64_t num_experts = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t rows_row_stride = 0;
  int64_t out_row_stride = 0;
  int64_t w13_expert_stride = 0;
  int64_t w2_expert_stride = 0;
  int64_t w13_scale_expert_stride = 0;
  int64_t w2_scale_expert_stride = 0;
  int64_t tile_rows = 0;      ///< most rows of an expert that a GPU multiplies at a time; 0 chooses; 0 on the CPU
  void* workspace = nullptr;  ///< grouped_mlp_cuda_workspace_bytes, aligned to 256 bytes; the CPU needs none

  bool is_empty() const { return num_rows == 0 || num_experts == 0 || hidden_size == 0; }

  bool has_fp8_weights() const { return w13_scale_inv != nullptr; }

  /// Throws Error for a negative size, a missing array, scales of one weight only, or a type that is not floating.
  void validate() const {
    detail::check_sizes({{"num_rows", num_rows},
                         {"num_tokens", num_tokens},
                         {"top_k", top_k},
                         {"num_experts", num_experts},
                         {"hidden_size", hidden_size},
                         {"intermediate_size", intermediate_size}});
    ZEXPERT_CHECK(row_slots == nullptr || top_k >= 1, "top_k must be at least 1, got ", top_k);
    detail::check_floating(data_type);
    detail::check_pointers({{"expert_offsets", expert_offsets}});
    if (!is_empty()) {
      detail::check_pointers({{"rows", rows}, {"out", out}});
    }
    if (!is_empty() && intermediate_size > 0) {
      detail::check_pointers({{"w13_weight", w13_weight}, {"w2_weight", w2_weight}});
    }
    ZEXPERT_CHECK((w13_scale_inv == nullptr) == (w2_scale_inv == nullptr),
                  "w13_scale_inv and w2_scale_inv must be given both or neither, got ",
                  w2_scale_inv == nullptr ? "w13_scale_inv" : "w2_scale_inv", " alone");
  }
};

/// Computes the experts of at most `max_rows` rows each, and neither reads nor writes rows of others. The activation
/// stays in the type of the sums, and the result is rounded once. Throws Error, before anything is written, for params
/// that are not valid, for expert_offsets that are not an ascending sequence from 0 to at most num_rows, and for an
/// entry of row_slots that is out of range.
void grouped_mlp_cpu(const GroupedMlpParams& params, int64_t max_rows = INT64_MAX);

/// Up to this many rows per expert, grouped_mlp_cpu is faster than a matrix-product library: it streams an expert's
/// weights, and the library's packing pays off only above. Measured crossovers against torch (oneDNN, MKL): about 160
/// rows in float32 with AVX-512 and 32 without, 48 in float16, 13 in bfloat16 where the processor has matrix units
/// (AMX). In bfloat16 without AMX this kernel led up to the 64 rows tried. Quantised weights must be dequantised for
/// the library: with AVX-512, this kernel leads up to about 160 rows; 32, with AMX or without AVX-512, was not
/// measured.
inline int64_t few_rows_limit(ScalarType type, CpuCapability capability, bool has_fp8_weights = false) {
  if (has_fp8_weights) {
    const bool has_matrix_units = type == ScalarType::kBFloat16 && has_amx_bf16();
    return capability == CpuCapability::kAvx512 && !has_matrix_units ? 160 : 32;
  }
  switch (type) {
    case ScalarType::kFloat32: return capability == CpuCapability::kAvx512 ? 160 : 32;
    case ScalarType::kFloat16: return 48;
    case ScalarType::kBFloat16: return has_amx_bf16() ? 12 : 64;
    case ScalarType::kFloat64:
    case ScalarType::kInt32:
    case ScalarType::kInt64: break;
  }
  return 16;
}

// Sizes that grouped_mlp_cuda accepts.
inline constexpr int64_t kHopperSizeStep = 64;  ///< hidden_size and intermediate_size are multiples of this
inline constexpr int64_t kHopperMaxExperts = 1024;
// The tiles that grouped_mlp_cuda cuts its products into: weight rows by at most this many rows of a segment.
inline constexpr int64_t kHopperFewTileRows = 64;      ///< with 256 weight rows, and more of them on their way
inline constexpr int64_t kHopperTallTileRows = 160;    ///< with 256 weight rows
inline constexpr int64_t kHopperMaxTileRows = 288;     ///< with 128 weight rows
inline constexpr int64_t kHopperFloat8TileRows = 136;  ///< with 256 weight rows in float8

/// The most rows of a tile. Few rows per expert are bound by reading the weights, many by the products. Either way a
/// segment should be one tile, so that its weights are read once. Longer segments have tall tiles again, which read
/// fewer bytes. `num_rows` includes the rows that do no work, because the host does not know how many there are.
inline int64_t hopper_tile_rows(int64_t num_rows, int64_t num_experts, bool has_fp8_weights = false) {
  constexpr int64_t kFewRows = 48;
  constexpr int64_t kFewRowsFloat8 = 16;
  constexpr int64_t kManyRows = 200;
  constexpr int64_t kTooManyRows = 560;
  if (num_rows <= (has_fp8_weights ? kFewRowsFloat8 : kFewRows) * num_experts)
    return kHopperFewTileRows;
  if (has_fp8_weights)
    return kHopperFloat8TileRows;
  const bool fits_wide = num_rows > kManyRows * num_experts && num_rows <= kTooManyRows * num_experts;
  return fits_wide ? kHopperMaxTileRows : kHopperTallTileRows;
}

/// Bytes of scratch that grouped_mlp_cuda needs on the current device: the activation, [num_rows, intermediate_size],
/// with row_slots the rows too, [num_rows, hidden_size], and little else.
int64_t grouped_mlp_cuda_workspace_bytes(const GroupedMlpParams& params);

/// Computes all experts on the current device, a GPU of compute capability 9.0, in bfloat16 or float16, for sizes as
/// above. Pointers are aligned to 16 bytes, strides are multiples of 8, and tile_rows is a multiple of 8 up to
/// kHopperMaxTileRows. The activation is rounded to the data's type. The same bits in every run; bits of a row may
/// depend on how many rows other experts have. Throws Error, before anything is launched, for params that are not valid
/// and for a device, type, size or alignment that it does not accept. Offsets that do not ascend within the rows give
/// segments without rows, and rows whose slot is out of range hold anything.
void grouped_mlp_cuda(const GroupedMlpParams& params, cudaStream_t stream);

}  // namespace zexpert
