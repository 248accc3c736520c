// SPDX-License-Identifier: Apache-2.0
// The weights of a layer's experts, which operators and kernels pass on whole.
#pragma once

#include <cstdint>
#include <optional>

#include "torch/box.h"
#include "torch/checks.h"
#include "torch/tensor.h"
#include "zexpert/grouped_mlp.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// The scales of float8_e4m3fn weights, one for each block of kScaleBlock x kScaleBlock; none for other weights.
struct ExpertScales {
  std::optional<Tensor> w13;  ///< [experts, 2 * blocks of intermediate_size, blocks of hidden_size]: gate, then up
  std::optional<Tensor> w2;   ///< [experts, blocks of hidden_size, blocks of intermediate_size]
};

/// One of the two weights.
struct ExpertWeight {
  Tensor weight;  ///< [experts, rows, columns]
  std::optional<Tensor> scale_inv;
  int64_t num_parts;  ///< matrices that are one below the other in the rows, each with blocks of scales of its own
};

struct ExpertWeights {
  Tensor w13;  ///< [experts, 2 * intermediate_size, hidden_size]: gate rows first, then up
  Tensor w2;   ///< [experts, hidden_size, intermediate_size]: down
  ExpertScales scales;

  ExpertWeights with(const ExpertScales& given) const { return {w13, w2, given}; }

  bool is_quantised() const { return scales.w13.has_value(); }
  ExpertWeight gate_up() const { return {w13, scales.w13, 2}; }
  ExpertWeight down() const { return {w2, scales.w2, 1}; }
  int64_t num_experts() const { return w13.size(0); }
  int64_t hidden_size() const { return w13.size(2); }
  int64_t intermediate_size() const { return w2.size(2); }

  // In the order of an operator's checks. `rows` is what the experts are run over.

  void check_devices(const Tensor& rows, const char* rows_name) const {
    check_device(w13, "w13_weight", rows, rows_name);
    check_device(w2, "w2_weight", rows, rows_name);
    if (scales.w13) {
      check_device(*scales.w13, "w13_scale_inv", rows, rows_name);
    }
    if (scales.w2) {
      check_device(*scales.w2, "w2_scale_inv", rows, rows_name);
    }
  }

  void check_dtypes(const Tensor& rows, const char* rows_name) const {
    check_dtype_of(w13, "w13_weight", scales.w13, "w13_scale_inv", rows, rows_name);
    check_dtype_of(w2, "w2_weight", scales.w2, "w2_scale_inv", rows, rows_name);
    ZEXPERT_CHECK(scales.w13.has_value() == scales.w2.has_value(),
                  "w13_scale_inv and w2_scale_inv must be given both or neither, got ",
                  scales.w13 ? "w13_scale_inv" : "w2_scale_inv", " alone");
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
    if (is_quantised()) {
      const int64_t hidden_blocks = num_scale_blocks(hidden_size);
      const int64_t inner_blocks = num_scale_blocks(intermediate_size);
      check_shape(*scales.w13, "w13_scale_inv", {num_experts, 2 * inner_blocks, hidden_blocks},
                  "[experts, 2 * ceil(intermediate_size / 128), ceil(hidden_size / 128)]");
      check_shape(*scales.w2, "w2_scale_inv", {num_experts, hidden_blocks, inner_blocks},
                  "[experts, ceil(hidden_size / 128), ceil(intermediate_size / 128)]");
    }
  }

  /// The weights in the layout that kernels accept: every expert's matrices are contiguous.
  ExpertWeights with_contiguous_matrices() const {
    ExpertWeights dense{ops::with_contiguous_matrices(w13), ops::with_contiguous_matrices(w2), {}};
    if (is_quantised()) {
      dense.scales = {ops::with_contiguous_matrices(*scales.w13), ops::with_contiguous_matrices(*scales.w2)};
    }
    return dense;
  }

 private:
  /// Without a scale, the weight is of the rows' type.
  static void check_dtype_of(const Tensor& weight, const char* name, const std::optional<Tensor>& scale,
                             const char* scale_name, const Tensor& rows, const char* rows_name) {
    const DType dtype = weight.scalar_type();
    if (scale) {
      ZEXPERT_CHECK(dtype == DType::Float8_e4m3fn, name, " must be float8_e4m3fn with ", scale_name, ", got ",
                    text(dtype));
      check_dtype(*scale, scale_name, DType::Float);
    } else {
      ZEXPERT_CHECK(dtype != DType::Float8_e4m3fn, scale_name, " must be given with float8_e4m3fn ", name,
                    ", whose values need a scale, got None");
      check_dtype(weight, name, rows.scalar_type(), rows, rows_name);
    }
  }
};

/// The schema has an argument for each weight. The scales, which came later, are two arguments of their own.
template <>
struct ReadArgument<ExpertWeights> {
  static constexpr uint64_t kCount = 2;
  static ExpertWeights read(ArgumentReader& reader) { return {reader.read<Tensor>(), reader.read<Tensor>(), {}}; }
};
template <>
struct ReadArgument<ExpertScales> {
  static constexpr uint64_t kCount = 2;
  static ExpertScales read(ArgumentReader& reader) {
    return {reader.read<std::optional<Tensor>>(), reader.read<std::optional<Tensor>>()};
  }
};

HIDDEN_NAMESPACE_END(zexpert, ops)
