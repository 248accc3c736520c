// SPDX-License-Identifier: Apache-2.0
// silu_and_mul: the SwiGLU activation between an expert's two matrix products, and its gradients.
#pragma once

#include <cstdint>

#include "zexpert/check_params.h"
#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// out[r, f] = silu(gate_up[r, f]) * gate_up[r, intermediate_size + f], silu(x) = x / (1 + exp(-x)), for every row r
/// that does work. Computed in float32 (float64 for float64 data) and rounded once.
/// Strides count elements. All pointers are to memory of the device that computes.
struct SiluAndMulParams {
  const void* gate_up = nullptr;  ///< [num_rows, 2 * intermediate_size]; unit inner stride
  void* out = nullptr;            ///< [num_rows, intermediate_size]; type of gate_up, unit inner stride
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_rows = 0;
  int64_t intermediate_size = 0;
  int64_t gate_up_row_stride = 0;
  int64_t out_row_stride = 0;
  const int32_t* last_offset = nullptr;  ///< null: all rows do work; else only rows below *last_offset do

  bool is_empty() const { return num_rows == 0 || intermediate_size == 0; }

  /// Throws Error for a negative size, a missing array or a type that is not floating.
  void validate() const {
    detail::check_sizes({{"num_rows", num_rows}, {"intermediate_size", intermediate_size}});
    detail::check_floating(data_type);
    if (!is_empty()) {
      detail::check_pointers({{"gate_up", gate_up}, {"out", out}});
    }
  }
};

/// Rows that do no work are neither read nor written. Throws Error, before anything is written, for params that are not
/// valid; on the CPU also if *last_offset is not between 0 and num_rows.
void silu_and_mul_cpu(const SiluAndMulParams& params);
void silu_and_mul_cuda(const SiluAndMulParams& params, cudaStream_t stream);

/// For out = silu(gate) * up, with gate = gate_up[r, f], up = gate_up[r, intermediate_size + f], s = sigmoid(gate):
///   grad_gate_up[r, f]                     = grad_out[r, f] * up * s * (1 + gate * (1 - s))
///   grad_gate_up[r, intermediate_size + f] = grad_out[r, f] * gate * s
/// With row_weight, out = row_weight * silu(gate) * up: the gradients above are multiplied by that factor, and
///   grad_row_weight[r] = <grad_out[r], silu(gate_up[r]) * up>
/// Computed in float32 (float64 for float64 data) and rounded once. grad_gate_up may be gate_up itself.
/// Strides count elements. All pointers are to memory of the device that computes.
struct SiluAndMulBackwardParams {
  const void* grad_out = nullptr;    ///< [num_rows, intermediate_size]; unit inner stride
  const void* gate_up = nullptr;     ///< [num_rows, 2 * intermediate_size]; type of grad_out, unit inner stride
  void* grad_gate_up = nullptr;      ///< [num_rows, 2 * intermediate_size]; type of grad_out, unit inner stride
  void* out = nullptr;               ///< null, or [num_rows, intermediate_size]: the forward's result again
  const void* row_weight = nullptr;  ///< null, or [num_rows]; float32, float64 for float64 data; contiguous
  void* grad_row_weight = nullptr;   ///< null, or [num_rows]; type of row_weight, contiguous
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_rows = 0;
  int64_t intermediate_size = 0;
  int64_t grad_out_row_stride = 0;
  int64_t gate_up_row_stride = 0;
  int64_t grad_gate_up_row_stride = 0;
  int64_t out_row_stride = 0;
  const int32_t* last_offset = nullptr;  ///< null: all rows do work; else only rows below *last_offset do

  bool is_empty() const { return num_rows == 0 || intermediate_size == 0; }

  /// Throws Error for a negative size, a missing array or a type that is not floating.
  void validate() const {
    detail::check_sizes({{"num_rows", num_rows}, {"intermediate_size", intermediate_size}});
    detail::check_floating(data_type);
    if (!is_empty()) {
      detail::check_pointers({{"grad_out", grad_out}, {"gate_up", gate_up}, {"grad_gate_up", grad_gate_up}});
    }
  }
};

/// Rows that do no work are not read, and their gradients become 0; their rows of `out` are not written. Throws Error
/// as the forward does.
void silu_and_mul_backward_cpu(const SiluAndMulBackwardParams& params);
void silu_and_mul_backward_cuda(const SiluAndMulBackwardParams& params, cudaStream_t stream);

}  // namespace zexpert
