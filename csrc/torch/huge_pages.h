// SPDX-License-Identifier: Apache-2.0
// Huge pages for large results.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

HIDDEN_NAMESPACE_BEGIN(zexpert, ops)

/// Asks the system to back fresh memory with huge pages. Allocators map a large block anew each time, and the first
/// access to ordinary pages costs several times a write. A system without huge pages ignores the advice.
inline void advise_huge_pages(void* data, int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kSmallest = int64_t{8} << 20;  // four huge pages
  constexpr uintptr_t kPage = 4096;
  if (num_bytes >= kSmallest) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    const uintptr_t first_page = (begin + kPage - 1) / kPage * kPage;
    madvise(reinterpret_cast<void*>(first_page), static_cast<size_t>(num_bytes) - (first_page - begin), MADV_HUGEPAGE);
  }
#else
  static_cast<void>(data);
  static_cast<void>(num_bytes);
#endif
}

HIDDEN_NAMESPACE_END(zexpert, ops)
