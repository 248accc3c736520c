// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_dispatch.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"
#include "cuda/vector.cuh"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kPlaceThreads = 1024;
constexpr int kSendThreads = 256;  // for a row
constexpr int kMostSendThreads = 1024;

/// A block per rank: places the tokens that are sent to it, kPlaceThreads at a time.
template <typename Id>
__global__ void __launch_bounds__(kPlaceThreads) place_tokens(const MoeDispatchParams params) {
  __shared__ int warp_sums[kPlaceThreads / kWarpSize];
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t peer = blockIdx.x;
  const int64_t first_expert = peer * params.num_local_experts;
  int32_t* const row_tokens = params.row_tokens + peer * params.max_tokens;
  int num_sent = 0;
  for (int64_t first = 0; first < params.num_tokens; first += blockDim.x) {
    const int64_t token = first + threadIdx.x;
    bool is_sent = false;
    if (token < params.num_tokens) {
      const Id* const ids = static_cast<const Id*>(params.topk_ids) + token * params.top_k;
#pragma unroll 4
      for (int64_t k = 0; k < params.top_k; ++k) {
        const int64_t local = static_cast<int64_t>(ids[k]) - first_expert;
        is_sent = is_sent || (local >= 0 && local < params.num_local_experts);
      }
    }
    const int position = num_sent + block_exclusive_sum(is_sent ? 1 : 0, warp_sums);
    if (is_sent)
      row_tokens[position] = static_cast<int32_t>(token);
    if (token < params.num_tokens)
      params.slot_rows[token * params.num_ranks + peer] =
          is_sent ? static_cast<int32_t>(peer * params.max_tokens) + position : -1;
    num_sent += __syncthreads_count(is_sent ? 1 : 0);
  }
  for (int64_t position = num_sent + threadIdx.x; position < params.max_tokens; position += blockDim.x) {
    row_tokens[position] = -1;
  }
}

/// kSendThreads threads per row at a time. Neighbours write to different ranks, and every rank begins with another.
template <typename T, int kVector, typename Id>
__global__ void __launch_bounds__(kMostSendThreads) send_rows(const MoeDispatchParams params) {
  using Weight = typename Computed<T>::type;
  using Elements = Vector<T, kVector>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const auto num_ranks = static_cast<int>(params.num_ranks);
  const auto num_rows = static_cast<int>(params.num_ranks * params.max_tokens);
  const OwnUnits own = own_units(kSendThreads);
  for (int64_t unit = own.first; unit < num_rows; unit += own.step) {
    const auto n = static_cast<int>(unit);
    const int position = n / num_ranks;
    const int peer = (n % num_ranks + static_cast<int>(params.rank)) % num_ranks;
    const int64_t token = params.row_tokens[peer * params.max_tokens + position];
    const int64_t row = params.rank * params.max_tokens + position;
    for (int64_t k = own.thread; k < params.top_k; k += kSendThreads) {
      int64_t local = -1;
      if (token >= 0) {
        const int64_t slot = token * params.top_k + k;
        local = static_cast<int64_t>(static_cast<const Id*>(params.topk_ids)[slot]) - peer * params.num_local_experts;
        static_cast<Weight*>(params.weights.of_rank[peer])[row * params.top_k + k] =
            static_cast<const Weight*>(params.topk_weights)[slot];
      }
      static_cast<int32_t*>(params.ids.of_rank[peer])[row * params.top_k + k] =
          local >= 0 && local < params.num_local_experts ? static_cast<int32_t>(local) : -1;
    }
    if (token < 0)
      continue;
    const T* __restrict__ source = static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride;
    T* __restrict__ target = static_cast<T*>(params.rows.of_rank[peer]) + row * params.hidden_size;
#pragma unroll 4
    for (int64_t i = int64_t{own.thread} * kVector; i < params.hidden_size; i += int64_t{kSendThreads} * kVector) {
      *reinterpret_cast<Elements*>(target + i) = *reinterpret_cast<const Elements*>(source + i);
    }
  }
}

template <typename T, typename Id>
void launch_moe_dispatch(const MoeDispatchParams& params, cudaStream_t stream) {
  const char* name = "moe_dispatch";
  const int64_t warps = (std::max(params.num_tokens, params.max_tokens) + kWarpSize - 1) / kWarpSize;
  const auto place_threads = static_cast<int>(std::min<int64_t>(warps * kWarpSize, kPlaceThreads));
  launch(name, &place_tokens<Id>, params.num_ranks, place_threads, 0, stream, params);

  bool fits = fits_vectors(params.hidden_states, params.hidden_row_stride, sizeof(T));
  for (int64_t rank = 0; rank < params.num_ranks; ++rank) {
    fits = fits && fits_vectors(params.rows.of_rank[rank], params.hidden_size, sizeof(T));
  }
  const WalkingGrid grid =
      walking_grid(params.num_ranks * params.max_tokens, kSendThreads, static_cast<int>(params.most_multiprocessors));
  visit_vector<T>(fits, params.hidden_size, [&](auto vector) {
    launch(name, &send_rows<T, vector.value, Id>, grid.num_blocks, grid.units_per_block * kSendThreads, 0, stream,
           params);
  });
}

}  // namespace
}  // namespace cuda

void moe_dispatch_cuda(const MoeDispatchParams& params, cudaStream_t stream) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    visit_index(params.ids_type,
                [&](auto id) { cuda::launch_moe_dispatch<decltype(element), decltype(id)>(params, stream); });
  });
}

}  // namespace zexpert
