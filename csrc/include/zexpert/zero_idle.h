// SPDX-License-Identifier: Apache-2.0
// Zeros for what the experts' products leave unwritten: gradients of weights that no row has used, and rows that do no
// work.
#pragma once

#include <cstdint>

#include "zexpert/check_params.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// data[e] = 0 for every expert e without rows, expert_offsets[e] >= expert_offsets[e + 1].
/// All pointers are to memory of the device that computes.
struct ZeroIdleExpertsParams {
  void* data = nullptr;                     ///< [num_experts, expert_size]; contiguous
  const int32_t* expert_offsets = nullptr;  ///< [num_experts + 1]
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_experts = 0;
  int64_t expert_size = 0;  ///< elements

  bool is_empty() const { return num_experts == 0 || expert_size == 0; }

  /// Throws Error for a negative size, a missing array or a type that is not floating.
  void validate() const {
    detail::check_sizes({{"num_experts", num_experts}, {"expert_size", expert_size}});
    detail::check_floating(data_type);
    if (!is_empty()) {
      detail::check_pointers({{"data", data}, {"expert_offsets", expert_offsets}});
    }
  }
};

/// Throws Error, before anything is written, for params that are not valid.
void zero_idle_experts_cpu(const ZeroIdleExpertsParams& params);
void zero_idle_experts_cuda(const ZeroIdleExpertsParams& params, cudaStream_t stream);

/// data[r] = 0 for every row r that does no work, r >= *last_offset.
/// All pointers are to memory of the device that computes.
struct ZeroIdleRowsParams {
  void* data = nullptr;                  ///< [num_rows, row_size]; contiguous
  const int32_t* last_offset = nullptr;  ///< the plan's last offset
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_rows = 0;
  int64_t row_size = 0;  ///< elements

  bool is_empty() const { return num_rows == 0 || row_size == 0; }

  /// Throws Error for a negative size, a missing array or a type that is not floating.
  void validate() const {
    detail::check_sizes({{"num_rows", num_rows}, {"row_size", row_size}});
    detail::check_floating(data_type);
    if (!is_empty()) {
      detail::check_pointers({{"data", data}, {"last_offset", last_offset}});
    }
  }
};

/// Throws Error, before anything is written, for params that are not valid.
void zero_idle_rows_cpu(const ZeroIdleRowsParams& params);
void zero_idle_rows_cuda(const ZeroIdleRowsParams& params, cudaStream_t stream);

}  // namespace zexpert
