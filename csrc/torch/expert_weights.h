// SPDX-License-Identifier: Apache-2.0
// The weights of a layer's experts, which operators and kernels pass on whole.
#pragma once

#include <cstdint>

#include "torch/box.h"
#include "torch/checks.h"
#include "torch/tensor.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

struct ExpertWeights {
  Tensor w13;  ///< [experts, 2 * intermediate_size, hidden_size]: gate rows first, then up
  Tensor w2;   ///< [experts, hidden_size, intermediate_size]: down

  int64_t num_experts() const { return w13.size(0); }
  int64_t hidden_size() const { return w13.size(2); }
  int64_t intermediate_size() const { return w2.size(2); }

  // In the order of an operator's checks. `rows` is what the experts are run over.

  void check_devices(const Tensor& rows, const char* rows_name) const {
    check_device(w13, "w13_weight", rows, rows_name);
    check_device(w2, "w2_weight", rows, rows_name);
  }

  void check_dtypes(const Tensor& rows, const char* rows_name) const {
    check_dtype(w13, "w13_weight", rows.scalar_type(), rows, rows_name);
    check_dtype(w2, "w2_weight", rows.scalar_type(), rows, rows_name);
  }

  void check_num_dims() const { check_dims(w13, "w13_weight", 3, "[experts, 2 * intermediate_size, hidden_size]"); }

  void check_shapes(int64_t num_experts, int64_t hidden_size) const {
    ZEXPERT_CHECK(w13.size(1) % 2 == 0, "w13_weight must have an even second size, gate and up rows, got shape ",
                  text(w13.sizes()));
    const int64_t intermediate_size = w13.size(1) / 2;
    check_shape(w13, "w13_weight", {num_experts, 2 * intermediate_size, hidden_size},
                "[experts, 2 * intermediate_size, hidden_size]");
    check_shape(w2, "w2_weight", {num_experts, hidden_size, intermediate_size},
                "[experts, hidden_size, intermediate_size]");
  }

  /// The weights in the layout that kernels accept: every expert's matrices are contiguous.
  ExpertWeights with_contiguous_matrices() const {
    return {ops::with_contiguous_matrices(w13), ops::with_contiguous_matrices(w2)};
  }
};

/// The schema has an argument for each field.
template <>
struct ReadArgument<ExpertWeights> {
  static constexpr uint64_t kCount = 2;
  static ExpertWeights read(ArgumentReader& reader) { return {reader.read<Tensor>(), reader.read<Tensor>()}; }
};

HIDDEN_NAMESPACE_END(zexpert, ops)
