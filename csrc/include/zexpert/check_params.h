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

}  // namespace zexpert::detail
