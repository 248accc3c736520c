// SPDX-License-Identifier: Apache-2.0
// silu_and_mul: the SwiGLU activation between an expert's two matrix products.
#pragma once

#include <cstdint>

#include "zexpert/cuda_stream.h"
#include "zexpert/scalar_types.h"

namespace zexpert {

/// out[r, f] = silu(gate_up[r, f]) * gate_up[r, intermediate_size + f], silu(x) = x / (1 + exp(-x)), for r below
/// num_rows. Computed in float32 (float64 for float64 data) and rounded once.
/// Strides count elements.
struct SiluAndMulParams {
  const void* gate_up = nullptr;  ///< [at least num_rows, 2 * intermediate_size]; unit inner stride
  void* out = nullptr;            ///< [at least num_rows, intermediate_size]; type of gate_up, unit inner stride
  ScalarType data_type = ScalarType::kFloat32;
  int64_t num_rows = 0;
  int64_t intermediate_size = 0;
  int64_t gate_up_row_stride = 0;
  int64_t out_row_stride = 0;
};

void silu_and_mul_cpu(const SiluAndMulParams& params);

/// The same on the current CUDA device; pointers are to its memory. Rows from *last_offset on, unless it is null, are
/// neither read nor written.
void silu_and_mul_cuda(const SiluAndMulParams& params, const int32_t* last_offset, cudaStream_t stream);

}  // namespace zexpert
