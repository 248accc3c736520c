// SPDX-License-Identifier: Apache-2.0
// Checks of an operator's parameters, the same on both devices, before anything is read, written or launched.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <utility>

#include "zexpert/error.h"
#include "zexpert/scalar_types.h"

namespace zexpert::detail {

inline void check_sizes(std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  for (const auto& [name, size] : sizes) ZEXPERT_CHECK(size >= 0, name, " must not be negative, got ", size);
}

/// For arrays that have elements.
inline void check_pointers(std::initializer_list<std::pair<const char*, const void*>> pointers) {
  for (const auto& [name, pointer] : pointers) ZEXPERT_CHECK(pointer != nullptr, name, " must not be null");
}

/// Throws Error unless `type` is one of the four floating types.
inline void check_floating(ScalarType type) {
  visit_floating(type, [](auto) {});
}

/// Throws Error unless `type` is int32 or int64.
inline void check_index_type(const char* name_of_array, ScalarType type) {
  ZEXPERT_CHECK(type == ScalarType::kInt32 || type == ScalarType::kInt64, name_of_array,
                " must be int32 or int64, got ", name(type));
}

}  // namespace zexpert::detail
