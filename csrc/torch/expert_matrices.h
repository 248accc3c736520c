// SPDX-License-Identifier: Apache-2.0
// The matrices of experts as PyTorch's product accepts them: quantised ones are dequantised first.
#pragma once

#include <cstdint>
#include <optional>

#include "torch/device.h"
#include "torch/expert_weights.h"
#include "torch/matrix_product.h"
#include "torch/tensor.h"
#include "zexpert/dequantize_blockwise.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN

/// Writes the values of `num_experts` experts from `first` on to `out`, dense, in the type `data_type`.
inline void dequantize_experts(const ExpertWeight& weight, int64_t first, int64_t num_experts, const Tensor& out) {
  const CurrentDevice device(out);
  const Tensor& codes = weight.weight;
  const Tensor& scales = *weight.scale_inv;
  const int64_t num_parts = weight.num_parts;
  DequantizeBlockwiseParams params;
  params.data_type = element_type(out);
  params.num_matrices = num_parts;
  params.num_rows = codes.size(1) / num_parts;
  params.num_columns = codes.size(2);
  params.weight_matrix_stride = params.num_rows * params.num_columns;
  params.scale_matrix_stride = scales.size(1) / num_parts * scales.size(2);
  for (int64_t e = 0; e < num_experts; ++e) {
    params.weight = static_cast<const char*>(codes.const_data_ptr()) + (first + e) * codes.stride(0);
    params.scale_inv = scales.const_data_ptr<float>() + (first + e) * scales.stride(0);
    params.out = static_cast<char*>(out.mutable_data_ptr()) +
                 e * codes.size(1) * codes.size(2) * static_cast<int64_t>(out.element_size());
    ZEXPERT_LAUNCH(dequantize_blockwise, params, device);
  }
}

/// The weights of all experts, without scales, in the type of `rows`.
inline ExpertWeights dequantized(const ExpertWeights& weights, const Tensor& rows) {
  const auto values = [&](const ExpertWeight& weight) {
    const Tensor& codes = weight.weight;
    const Tensor out = empty({codes.size(0), codes.size(1), codes.size(2)}, rows.scalar_type(), rows);
    dequantize_experts(weight, 0, codes.size(0), out);
    return out;
  };
  return {values(weights.gate_up()), values(weights.down()), {}};
}

/// The matrices of one weight, an expert at a time.
class ExpertMatrices {
 public:
  /// `rows` is what they are multiplied with.
  ExpertMatrices(const ExpertWeight& weight, const Tensor& rows) : weight_(weight), multiply_(rows) {
    if (weight.scale_inv) {
      scratch_ = empty({weight.weight.size(1), weight.weight.size(2)}, rows.scalar_type(), rows);
    }
  }

  /// An expert's matrix; a quantised one is valid until the next call.
  Matrix operator()(int64_t expert) const {
    const Tensor& weight = weight_.weight;
    if (!scratch_) {
      return multiply_.matrix(weight.const_data_ptr(), expert * weight.stride(0), weight.size(1), weight.size(2),
                              weight.size(2));
    }
    dequantize_experts(weight_, expert, 1, *scratch_);
    return multiply_.matrix(scratch_->const_data_ptr(), 0, weight.size(1), weight.size(2), weight.size(2));
  }

 private:
  ExpertWeight weight_;
  MatrixProduct multiply_;
  std::optional<Tensor> scratch_;  ///< of quantised weights: an expert's matrix
};

ZEXPERT_DEVICE_NAMESPACE_END
