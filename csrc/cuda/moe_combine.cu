// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_combine.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/types.cuh"
#include "cuda/vector.cuh"
#include "cuda/weighted_rows.cuh"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kThreads = 128;  // for a part of a row
constexpr int kMostThreads = 1024;

/// A thread per vector of a row's part at a time. Neighbours write to different ranks, and every rank begins with
/// another.
template <typename T, int kVector>
__global__ void __launch_bounds__(kMostThreads)
    moe_combine(const MoeCombineParams params, const int threads_per_part, const int parts_per_row) {
  using A = typename Computed<T>::type;
  constexpr int kRowsAtOnce = 6 * int{sizeof(float)} / int{sizeof(A)};
  wait_for_previous_kernels();
  let_next_kernel_start();
  const auto num_ranks = static_cast<int>(params.num_ranks);
  const int64_t num_parts = params.num_ranks * params.max_tokens * parts_per_row;
  const OwnUnits own = own_units(threads_per_part);
  for (int64_t n = own.first; n < num_parts; n += own.step) {
    const auto in_order = static_cast<int>(n / parts_per_row);
    const auto part = static_cast<int>(n % parts_per_row);
    const int position = in_order / num_ranks;
    const int peer = (in_order % num_ranks + static_cast<int>(params.rank)) % num_ranks;
    const int64_t token = peer * params.max_tokens + position;
    const int64_t column = (int64_t{part} * threads_per_part + own.thread) * kVector;
    const bool active = column < params.hidden_size;
    const A* const weights =
        params.topk_weights == nullptr ? nullptr : static_cast<const A*>(params.topk_weights) + token * params.top_k;
    A sums[kVector] = {};
    const bool any = add_weighted_rows<T, kVector, kRowsAtOnce>(
        static_cast<const T*>(params.rows) + column, params.rows_row_stride, params.num_rows,
        params.slot_rows + token * params.top_k, weights, params.top_k, active, sums);
    if (!any || !active)
      continue;
    Vector<T, kVector> out;
#pragma unroll
    for (int v = 0; v < kVector; ++v) out.values[v] = Computed<T>::to(sums[v]);
    const int64_t row = params.rank * params.max_tokens + position;
    store_once<T, kVector>(static_cast<T*>(params.out.of_rank[peer]) + row * params.hidden_size + column,
                           to_words<T, kVector>(out));
  }
}

template <typename T, int kVector>
void launch_moe_combine(const MoeCombineParams& params, cudaStream_t stream) {
  const int threads = threads_for_row<kVector>(params.hidden_size, kThreads);
  const int64_t parts_per_row = blocks_for_row<kVector>(params.hidden_size, threads);
  const WalkingGrid grid = walking_grid(params.num_ranks * params.max_tokens * parts_per_row, threads,
                                        static_cast<int>(params.most_multiprocessors));
  launch("moe_combine", &moe_combine<T, kVector>, grid.num_blocks, grid.units_per_block * threads, 0, stream, params,
         threads, static_cast<int>(parts_per_row));
}

}  // namespace
}  // namespace cuda

void moe_combine_cuda(const MoeCombineParams& params, cudaStream_t stream) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    using T = decltype(element);
    bool fits = cuda::fits_vectors(params.rows, params.rows_row_stride, sizeof(T));
    for (int64_t rank = 0; rank < params.num_ranks; ++rank) {
      fits = fits && cuda::fits_vectors(params.out.of_rank[rank], params.hidden_size, sizeof(T));
    }
    cuda::visit_vector<T>(fits, params.hidden_size,
                          [&](auto vector) { cuda::launch_moe_combine<T, decltype(vector)::value>(params, stream); });
  });
}

}  // namespace zexpert
