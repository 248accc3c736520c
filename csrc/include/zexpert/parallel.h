// SPDX-License-Identifier: Apache-2.0
// Threads for CPU kernels. The core brings no pool of its own: it uses OpenMP where it was compiled in, and the torch
// library replaces that with torch's pool, so that torch.set_num_threads holds for zexpert too.
#pragma once

#include <cstdint>

namespace zexpert {

/// Runs `body(context, begin, end)` over disjoint ranges that cover [begin, end), each of at least `grain_size`
/// iterations but for the last. Bodies must not throw.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain_size, ParallelBody body, void* context);

/// Replaces the pool behind parallel_for for the whole process.
void set_parallel_for(ParallelFor implementation);

namespace detail {
void parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelBody body, void* context);
}  // namespace detail

/// Runs `fn(begin, end)` over disjoint ranges that cover [begin, end), in parallel where more than `grain_size`
/// iterations are to be done. Does nothing for an empty range.
template <typename Fn>
void parallel_for(int64_t begin, int64_t end, int64_t grain_size, const Fn& fn) {
  const ParallelBody body = [](int64_t range_begin, int64_t range_end, void* context) {
    (*static_cast<const Fn*>(context))(range_begin, range_end);
  };
  detail::parallel_for(begin, end, grain_size, body, const_cast<Fn*>(&fn));
}

}  // namespace zexpert
