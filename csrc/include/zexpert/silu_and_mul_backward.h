// SPDX-License-Identifier: Apache-2.0
// silu_and_mul_backward: gradients of the SwiGLU activation.
#pragma once

#include <cstdint>

#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// For out = silu(gate) * up, with gate = gate_up[r, f], up = gate_up[r, intermediate_size + f], s = sigmoid(gate):
///   grad_gate_up[r, f]                     = grad_out[r, f] * up * s * (1 + gate * (1 - s))
///   grad_gate_up[r, intermediate_size + f] = grad_out[r, f] * gate * s
/// for r below num_rows; later rows are neither read nor written. With row_weight, out = row_weight * silu(gate) * up:
/// the gradients above take that factor, and
///   grad_row_weight[r] = <grad_out[r], silu(gate_up[r]) * up>
/// Computed in float32 (float64 for float64 data) and rounded once. grad_gate_up may be gate_up itself.
/// Strides count elements.
struct SiluAndMulBackwardParams {
  const void* grad_out = nullptr;  ///< [at least num_rows, intermediate_size]; unit inner stride
  const void* gate_up = nullptr;   ///< [at least num_rows, 2 * intermediate_size]; type of grad_out, unit inner stride
  void* grad_gate_up = nullptr;    ///< [at least num_rows, 2 * intermediate_size]; type of grad_out, unit inner stride
  void* out = nullptr;             ///< null, or [at least num_rows, intermediate_size]: the forward's result again
  const void* row_weight = nullptr;  ///< null, or [at least num_rows]; float32, float64 for float64 data; contiguous
  void* grad_row_weight = nullptr;   ///< null, or [at least num_rows]; likewise
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_rows = 0;
  int64_t intermediate_size = 0;
  int64_t grad_out_row_stride = 0;
  int64_t gate_up_row_stride = 0;
  int64_t grad_gate_up_row_stride = 0;
  int64_t out_row_stride = 0;
};

void silu_and_mul_backward_cpu(const SiluAndMulBackwardParams& params);

/// The same on the current CUDA device, without out and row weights; pointers are to its memory. Rows from *last_offset
/// on, unless it is null, are not read, and their gradient is 0.
void silu_and_mul_backward_cuda(const SiluAndMulBackwardParams& params, const int32_t* last_offset,
                                cudaStream_t stream);

}  // namespace zexpert
