// SPDX-License-Identifier: Apache-2.0
// Checks of an operator's sizes and pointers, before anything is read or written.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <utility>

#include "zexpert/error.h"

namespace zexpert {

inline void check_sizes(std::initializer_list<std::pair<const char*, int64_t>> sizes) {
  for (const auto& [name, size] : sizes) ZEXPERT_CHECK(size >= 0, name, " must not be negative, got ", size);
}

/// Of arrays that have elements.
inline void check_pointers(std::initializer_list<std::pair<const char*, const void*>> pointers) {
  for (const auto& [name, pointer] : pointers) ZEXPERT_CHECK(pointer != nullptr, name, " must not be null");
}

}  // namespace zexpert
