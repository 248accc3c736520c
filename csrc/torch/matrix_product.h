// SPDX-License-Identifier: Apache-2.0
// PyTorch's matrix product on matrices anywhere in memory.
#pragma once

#include <array>
#include <cstdint>

#include "torch/tensor.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// A matrix in memory that its owner keeps alive. Strides count elements.
struct Matrix {
  const void* data;
  int64_t num_rows;
  int64_t num_columns;
  int64_t row_stride;
  int64_t column_stride = 1;

  Matrix transposed() const { return {data, num_columns, num_rows, column_stride, row_stride}; }
};

/// Multiplies matrices of one device and dtype. It passes views of memory to PyTorch, which no autograd graph records.
/// The tensors that own the memory outlive the call.
class MatrixProduct {
 public:
  explicit MatrixProduct(const Tensor& like)
      : device_(like.device()), dtype_(like.scalar_type()), element_size_(static_cast<int64_t>(like.element_size())) {}

  /// The matrix that starts `offset` elements after `base`; the elements of a row are adjacent.
  Matrix matrix(const void* base, int64_t offset, int64_t num_rows, int64_t num_columns, int64_t row_stride) const {
    return {static_cast<const char*>(base) + offset * element_size_, num_rows, num_columns, row_stride};
  }

  /// out = a @ b. No matrix may be empty: an empty one may have no address.
  void operator()(const Matrix& a, const Matrix& b, const Matrix& out) const {
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack{from(view(a)), from(view(b)), from(view(out))};
    const AOTITorchError status = torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION);
    ZEXPERT_CHECK(status == TORCH_SUCCESS, "PyTorch could not multiply matrices of shapes [", a.num_rows, ", ",
                  a.num_columns, "] and [", b.num_rows, ", ", b.num_columns, "] of ", text(dtype_), " on ",
                  text(device_), "; the memory may be full");
    torch::stable::detail::to<Tensor>(stack[0]);  // releases the reference to out that is returned
  }

 private:
  Tensor view(const Matrix& matrix) const {
    const std::array<int64_t, 2> sizes{matrix.num_rows, matrix.num_columns};
    const std::array<int64_t, 2> strides{matrix.row_stride, matrix.column_stride};
    return torch::stable::from_blob(const_cast<void*>(matrix.data), sizes, strides, device_, dtype_);
  }

  torch::stable::Device device_;
  DType dtype_;
  int64_t element_size_;
};

HIDDEN_NAMESPACE_END(zexpert, ops)
