// SPDX-License-Identifier: Apache-2.0
// Helpers for tensors of the LibTorch stable ABI: element types, text for messages, layout, allocation.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

#include "torch/huge_pages.h"
#include "zexpert/error.h"
#include "zexpert/scalar_types.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

using torch::stable::Tensor;
using DType = torch::headeronly::ScalarType;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// Element types

/// zexpert's element type of a torch dtype, if kernels support it.
inline std::optional<ScalarType> to_scalar_type(DType dtype) {
  switch (dtype) {
    case DType::Float: return ScalarType::kFloat32;
    case DType::Double: return ScalarType::kFloat64;
    case DType::BFloat16: return ScalarType::kBFloat16;
    case DType::Half: return ScalarType::kFloat16;
    case DType::Int: return ScalarType::kInt32;
    case DType::Long: return ScalarType::kInt64;
    default: return std::nullopt;
  }
}

/// The element type of a tensor whose dtype has been checked.
inline ScalarType element_type(const Tensor& tensor) { return to_scalar_type(tensor.scalar_type()).value(); }

inline bool is_floating(DType dtype) {
  return dtype == DType::Float || dtype == DType::Double || dtype == DType::BFloat16 || dtype == DType::Half;
}

/// The type of routing weights for data of type `data`: float32, or float64 for float64.
inline DType weight_dtype(DType data) { return data == DType::Double ? DType::Double : DType::Float; }

// Text for messages

/// The dtype's name in Python without "torch.".
inline std::string text(DType dtype) {
  if (const auto type = to_scalar_type(dtype)) {
    return name(*type);
  }
  switch (dtype) {
    case DType::Byte: return "uint8";
    case DType::Char: return "int8";
    case DType::Short: return "int16";
    case DType::Bool: return "bool";
    case DType::ComplexHalf: return "complex32";
    case DType::ComplexFloat: return "complex64";
    case DType::ComplexDouble: return "complex128";
    case DType::Float8_e4m3fn: return "float8_e4m3fn";
    case DType::Float8_e5m2: return "float8_e5m2";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::string text(Sizes sizes) {
  std::string result = "[";
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    result += (dim == 0 ? "" : ", ") + std::to_string(sizes[dim]);
  }
  return result + "]";
}

inline std::string text(const torch::stable::Device& device) {
  using torch::headeronly::DeviceType;
  std::string result;
  switch (device.type()) {
    case DeviceType::CPU: return "cpu";
    case DeviceType::Meta: return "meta";
    case DeviceType::CUDA: result = "cuda"; break;
    case DeviceType::XPU: result = "xpu"; break;
    case DeviceType::MPS: result = "mps"; break;
    default: result = "device type " + std::to_string(static_cast<int>(device.type()));
  }
  return device.has_index() ? result + ":" + std::to_string(device.index()) : result;
}

// Layout

/// A view of `tensor`, detached from autograd.
inline Tensor detached(const Tensor& tensor) {
  using torch::stable::detail::from;
  std::array<StableIValue, 1> stack{from(tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

/// An uninitialised dense tensor on the device of `like`.
inline Tensor allocate(Sizes sizes, DType dtype, const Tensor& like) {
  try {
    return torch::stable::new_empty(like, sizes, dtype);
  } catch (const std::exception&) {  // its text names a function inside torch
    zexpert::detail::throw_error("could not allocate a tensor of shape ", text(sizes), " of ", text(dtype), " on ",
                                 text(like.device()));
  }
}

/// A dense copy of `tensor` in `dtype`, detached from autograd.
inline Tensor dense_copy(const Tensor& tensor, DType dtype) {
  const Tensor source = detached(tensor);
  Tensor copy = allocate(source.sizes(), dtype, source);
  torch::stable::copy_(copy, source);
  return copy;
}

inline Tensor dense_copy(const Tensor& tensor) { return dense_copy(tensor, tensor.scalar_type()); }

inline Tensor as_contiguous(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : dense_copy(tensor); }

/// Whether the elements of a row (the last dimension) are adjacent.
inline bool has_unit_inner_stride(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  return tensor.size(last) <= 1 || tensor.stride(last) == 1;
}

/// `tensor`, or a dense copy if the elements of its rows are not adjacent.
inline Tensor with_unit_inner_stride(const Tensor& tensor) {
  return has_unit_inner_stride(tensor) ? tensor : dense_copy(tensor);
}

/// `tensor` [A, B, C], or a dense copy if one of its [B, C] matrices is not contiguous.
inline Tensor with_contiguous_matrices(const Tensor& tensor) {
  const bool rows_follow = tensor.size(1) <= 1 || tensor.stride(1) == tensor.size(2);
  return rows_follow && has_unit_inner_stride(tensor) ? tensor : dense_copy(tensor);
}

/// The bytes from the first element of a tensor to the end of its last one.
inline std::pair<const char*, const char*> memory_range(const Tensor& tensor) {
  const auto* begin = static_cast<const char*>(tensor.const_data_ptr());
  int64_t last = 0;
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += (tensor.size(dim) - 1) * tensor.stride(dim);
  }
  const auto element_size = static_cast<int64_t>(tensor.element_size());
  return {begin, tensor.numel() == 0 ? begin : begin + (last + 1) * element_size};
}

/// `input`, or a dense copy if a write to `out` could change elements of `input` that are not read yet: if the two
/// share memory and do not have the same elements at the same addresses.
inline Tensor unaliased(const Tensor& input, const Tensor& out) {
  const auto [input_begin, input_end] = memory_range(input);
  const auto [out_begin, out_end] = memory_range(out);
  const bool disjoint = input_end <= out_begin || out_end <= input_begin;
  const auto equal = [](Sizes a, Sizes b) { return std::equal(a.begin(), a.end(), b.begin(), b.end()); };
  const bool same =
      input_begin == out_begin && equal(input.sizes(), out.sizes()) && equal(input.strides(), out.strides());
  return disjoint || same ? input : dense_copy(input);
}

// Allocation

/// An uninitialised dense tensor on the device of `like`; on the CPU, a large one in huge pages.
inline Tensor empty(std::initializer_list<int64_t> sizes, DType dtype, const Tensor& like) {
  const Tensor tensor = allocate(Sizes(sizes), dtype, like);
  if (tensor.device().type() == torch::headeronly::DeviceType::CPU) {
    advise_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * static_cast<int64_t>(tensor.element_size()));
  }
  return tensor;
}

/// Uninitialised scratch for an operator's workspace, on the device of `like`; none for 0 bytes.
inline std::optional<Tensor> empty_workspace(int64_t num_bytes, const Tensor& like) {
  return num_bytes > 0 ? std::optional<Tensor>(empty({num_bytes}, DType::Byte, like)) : std::nullopt;
}

/// Sets the rows (indices of the first dimension) `first` .. first + count - 1 to 0.
inline void zero_rows(const Tensor& tensor, int64_t first, int64_t count) {
  if (count > 0 && tensor.numel() > 0) {
    Tensor all = tensor;
    Tensor rows = torch::stable::narrow(all, 0, first, count);
    torch::stable::zero_(rows);
  }
}

HIDDEN_NAMESPACE_END(zexpert, ops)
