// SPDX-License-Identifier: Apache-2.0
// Matrix products of all experts' segments of rows with matrices of the experts' own, by PyTorch.
#pragma once

#include <array>
#include <cstdint>
#include <optional>

#include "torch/device.h"
#include "torch/expert_weights.h"
#include "torch/matrix_product.h"
#include "torch/tensor.h"
#include "zexpert/grouped_mlp_choice.h"

ZEXPERT_DEVICE_NAMESPACE_BEGIN

/// Rows past the last offset are not read, and their results hold anything. Results are dense.
class SegmentProducts {
 public:
  /// kGroupedMm: all experts in one launch, bfloat16; the offsets stay on the device. kTorch: one product for each
  /// expert; the offsets are copied to the host, and Error is thrown if they do not ascend from 0 to at most num_rows.
  SegmentProducts(GroupedMlpImplementation implementation, const Tensor& expert_offsets, int64_t num_rows);

  /// result[r] = rows[r] @ matrices[e].T for the rows r of expert e: [rows, n] of rows [rows, k] and matrices
  /// [experts, n, k]. Quantised matrices need kTorch.
  Tensor with_transposed(const Tensor& rows, const ExpertWeight& matrices) const;

  /// result[r] = rows[r] @ matrices[e] for the rows r of expert e: [rows, k] of rows [rows, n] and matrices
  /// [experts, n, k].
  Tensor with_matrices(const Tensor& rows, const ExpertWeight& matrices) const;

  /// result[e] = left[rows of e].T @ right[rows of e]: [experts, m, n] of left [rows, m] and right [rows, n]; 0 for an
  /// expert without rows.
  Tensor between(const Tensor& left, const Tensor& right) const;

 private:
  int64_t num_experts() const { return expert_offsets_.size(0) - 1; }

  Tensor multiply_all(const Tensor& rows, const ExpertWeight& matrices, bool transposed) const;
  Tensor grouped_mm(const Tensor& left, const Tensor& right) const;

  Tensor expert_offsets_;
  std::optional<Tensor> host_offsets_;  ///< kTorch
};

ZEXPERT_DEVICE_NAMESPACE_END
