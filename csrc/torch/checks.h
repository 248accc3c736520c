// SPDX-License-Identifier: Apache-2.0
// Checks of the ops' arguments. Each throws zexpert::Error with one sentence that names the argument, what it must be
// and what it was. Ops call them in this order: device, dtype, dimensions, sizes, layout.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>

#include "torch/tensor.h"
#include "zexpert/error.h"

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

inline void check_defined(const Tensor& tensor, const char* name) {
  ZEXPERT_CHECK(tensor.defined(), name, " must be a tensor, got None");
}

/// Throws Error if the tensor's memory has been freed. Sharded training frees a parameter's memory between its uses;
/// the parameter may be a part of a larger tensor.
inline void check_memory(const Tensor& tensor, const char* name) {
  const auto offset_bytes = static_cast<uintptr_t>(tensor.storage_offset()) * tensor.element_size();
  ZEXPERT_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) != offset_bytes || tensor.numel() == 0, name,
                " must have memory, got a tensor whose storage has been freed, of shape ", text(tensor.sizes()));
}

inline void check_device(const Tensor& tensor, const char* name, const Tensor& other, const char* other_name) {
  check_defined(tensor, name);
  check_defined(other, other_name);
  const auto device = tensor.device();
  const auto wanted = other.device();
  ZEXPERT_CHECK(device == wanted, name, " must be on ", text(wanted), " like ", other_name, ", got ", text(device));
  check_memory(tensor, name);
}

inline void check_floating(const Tensor& tensor, const char* name) {
  check_memory(tensor, name);
  const DType dtype = tensor.scalar_type();
  ZEXPERT_CHECK(is_floating(dtype), name, " must be float32, float64, bfloat16 or float16, got ", text(dtype));
}

inline void check_dtype(const Tensor& tensor, const char* name, DType wanted) {
  const DType dtype = tensor.scalar_type();
  ZEXPERT_CHECK(dtype == wanted, name, " must be ", text(wanted), ", got ", text(dtype));
}

/// For a dtype that follows from another argument's.
inline void check_dtype(const Tensor& tensor, const char* name, DType wanted, const Tensor& other,
                        const char* other_name) {
  const DType dtype = tensor.scalar_type();
  ZEXPERT_CHECK(dtype == wanted, name, " must be ", text(wanted), " with ", text(other.scalar_type()), " ", other_name,
                ", got ", text(dtype));
}

/// `dimensions` names the dimensions, as in "[tokens, experts]".
inline void check_dims(const Tensor& tensor, const char* name, int64_t num_dims, const char* dimensions) {
  ZEXPERT_CHECK(tensor.dim() == num_dims, name, " must have ", num_dims, num_dims == 1 ? " dimension " : " dimensions ",
                dimensions, ", got shape ", text(tensor.sizes()));
}

/// `dimensions` names the dimensions, as in "[tokens, experts]".
inline void check_shape(const Tensor& tensor, const char* name, std::initializer_list<int64_t> wanted,
                        const char* dimensions) {
  check_dims(tensor, name, static_cast<int64_t>(wanted.size()), dimensions);
  bool fits = true;
  int64_t dim = 0;
  for (const int64_t size : wanted) {
    fits = fits && tensor.size(dim++) == size;
  }
  ZEXPERT_CHECK(fits, name, " must have shape ", text(Sizes(wanted)), " ", dimensions, ", got ", text(tensor.sizes()));
}

/// `expert_offsets` is [experts + 1], at least one offset.
inline void check_expert_offsets_dims(const Tensor& expert_offsets) {
  check_dims(expert_offsets, "expert_offsets", 1, "[experts + 1]");
  ZEXPERT_CHECK(expert_offsets.size(0) >= 1, "expert_offsets must have at least 1 element, got shape ",
                text(expert_offsets.sizes()));
}

/// row_slots has an entry for every slot, or fewer: a plan's may be cut behind the last offset.
inline void check_row_slots_size(const Tensor& row_slots, int64_t num_tokens, int64_t top_k) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  ZEXPERT_CHECK(top_k <= kMost && num_tokens <= kMost / top_k, "num_tokens * top_k must be below 2^31, got ",
                num_tokens, " * ", top_k);
  ZEXPERT_CHECK(row_slots.size(0) <= num_tokens * top_k, "row_slots must have at most ", top_k,
                " elements for each of the ", num_tokens, " tokens, got shape ", text(row_slots.sizes()));
}

/// The address of the last offset, the number of rows that do work, in memory of the offsets' device.
class LastOffset {
 public:
  explicit LastOffset(const std::optional<Tensor>& expert_offsets) {
    if (expert_offsets) {
      offsets_ = as_contiguous(*expert_offsets);
    }
  }

  /// Null without offsets.
  const int32_t* pointer() const {
    return offsets_ ? offsets_->const_data_ptr<int32_t>() + offsets_->size(0) - 1 : nullptr;
  }

 private:
  std::optional<Tensor> offsets_;
};

HIDDEN_NAMESPACE_END(zexpert, ops)
