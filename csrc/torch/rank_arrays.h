// SPDX-License-Identifier: Apache-2.0
// Lists of tensors, one for each rank, that kernels write: as this process addresses the ranks' memory.
#pragma once

#include <vector>

#include "torch/checks.h"
#include "torch/tensor.h"
#include "zexpert/rank_arrays.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

using TensorList = std::vector<Tensor>;

inline void check_ranks(const TensorList& tensors, const char* name, int64_t rank) {
  const auto num_ranks = static_cast<int64_t>(tensors.size());
  ZEXPERT_CHECK(num_ranks >= 1 && num_ranks <= kMaxRanks, name, " must have a tensor for each of 1 to ", kMaxRanks,
                " ranks, got ", num_ranks);
  ZEXPERT_CHECK(rank >= 0 && rank < num_ranks, "rank must be between 0 and ", num_ranks - 1, ", got ", rank);
}

/// One tensor for each rank, all contiguous, on one device and of one dtype and shape.
inline void check_rank_tensors(const TensorList& tensors, const char* name, int64_t num_ranks, const Tensor& like,
                               const char* like_name, DType dtype, std::initializer_list<int64_t> shape,
                               const char* dimensions) {
  ZEXPERT_CHECK(static_cast<int64_t>(tensors.size()) == num_ranks, name, " must have a tensor for each of the ",
                num_ranks, " ranks, got ", tensors.size());
  for (const Tensor& tensor : tensors) check_device(tensor, name, like, like_name);
  for (const Tensor& tensor : tensors) check_dtype(tensor, name, dtype);
  for (const Tensor& tensor : tensors) {
    check_shape(tensor, name, shape, dimensions);
    ZEXPERT_CHECK(tensor.is_contiguous(), name, " must be contiguous, got strides ", text(tensor.strides()));
  }
}

inline RankArrays rank_arrays(const TensorList& tensors) {
  RankArrays arrays;
  for (size_t rank = 0; rank < tensors.size(); ++rank) arrays.of_rank[rank] = tensors[rank].mutable_data_ptr();
  return arrays;
}

HIDDEN_NAMESPACE_END(zexpert, ops)
