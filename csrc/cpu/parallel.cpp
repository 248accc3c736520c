// SPDX-License-Identifier: Apache-2.0
#include "zexpert/parallel.h"

#include <algorithm>
#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace zexpert {
namespace {

#if defined(_OPENMP)
void default_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelBody body, void* context) {
  const int64_t count = end - begin;
  const int64_t most_ranges = count / std::max<int64_t>(grain_size, 1);
  const int64_t num_ranges = omp_in_parallel() ? 1 : std::min<int64_t>(omp_get_max_threads(), most_ranges);
  if (num_ranges <= 1) {
    body(begin, end, context);
    return;
  }
  const int64_t range = (count + num_ranges - 1) / num_ranges;
#pragma omp parallel for num_threads(static_cast<int>(num_ranges)) schedule(static, 1)
  for (int64_t i = 0; i < num_ranges; ++i) {
    const int64_t range_begin = begin + i * range;
    const int64_t range_end = std::min(end, range_begin + range);
    if (range_begin < range_end) {
      body(range_begin, range_end, context);
    }
  }
}
#else
void default_parallel_for(int64_t begin, int64_t end, int64_t /*grain_size*/, ParallelBody body, void* context) {
  body(begin, end, context);
}
#endif

std::atomic<ParallelFor> installed_parallel_for{&default_parallel_for};

}  // namespace

void set_parallel_for(ParallelFor implementation) {
  installed_parallel_for.store(implementation != nullptr ? implementation : &default_parallel_for);
}

void detail::parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelBody body, void* context) {
  if (begin < end) {
    installed_parallel_for.load()(begin, end, grain_size, body, context);
  }
}

}  // namespace zexpert
