// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_permute.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cuda/atomic>

#include "cuda/launch.cuh"
#include "cuda/types.cuh"
#include "cuda/vector.cuh"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kThreads = 256;

/// A block per row; T is as wide as an element, whatever it holds.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) moe_permute(const MoePermuteParams params) {
  using Elements = Vector<T, kVector>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t row = blockIdx.x;
  const int32_t slot = params.row_slots[row];
  if (!does_work(params.last_offset, row) || slot < 0 || slot >= params.num_tokens * params.top_k)
    return;
  const int64_t token = slot / static_cast<int32_t>(params.top_k);
  const T* __restrict__ source = static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride;
  T* __restrict__ target = static_cast<T*>(params.rows) + row * params.hidden_size;
#pragma unroll 4
  for (int64_t i = int64_t{threadIdx.x} * kVector; i < params.hidden_size; i += int64_t{blockDim.x} * kVector) {
    *reinterpret_cast<Elements*>(target + i) = *reinterpret_cast<const Elements*>(source + i);
  }
}

/// A thread per vector of a token, which is read once and written to all of the token's rows.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    moe_permute_by_token(const MoePermuteParams params, const int blocks_per_token) {
  wait_for_previous_kernels();
  let_next_kernel_start();
  const auto [token, column] = own_vector<kVector>(blocks_per_token);
  if (column >= params.hidden_size)
    return;
  using Elements = Vector<T, kVector>;
  const Elements elements = *reinterpret_cast<const Elements*>(static_cast<const T*>(params.hidden_states) +
                                                               token * params.hidden_row_stride + column);
  T* const target = static_cast<T*>(params.rows) + column;
  const int32_t* const own_rows = params.slot_rows + token * params.top_k;
  constexpr int kAtOnce = 4;  // loads in flight: for few tokens their latency is the cost
  for (int64_t first = 0; first < params.top_k; first += kAtOnce) {
    int32_t rows[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) rows[i] = first + i < params.top_k ? own_rows[first + i] : -1;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (rows[i] >= 0 && rows[i] < params.num_rows)
        *reinterpret_cast<Elements*>(target + rows[i] * params.hidden_size) = elements;
    }
  }
}

template <typename T>
void launch_moe_permute(const MoePermuteParams& params, cudaStream_t stream) {
  const bool fits = fits_vectors(params.hidden_states, params.hidden_row_stride, sizeof(T)) &&
                    fits_vectors(params.rows, params.hidden_size, sizeof(T));
  visit_vector<T>(fits, params.hidden_size, [&](auto vector) {
    const int threads = threads_for_row<vector.value>(params.hidden_size, kThreads);
    if (params.slot_rows == nullptr) {
      launch("moe_permute", &moe_permute<T, vector.value>, params.num_rows, threads, 0, stream, params);
      return;
    }
    const int64_t blocks_per_token = blocks_for_row<vector.value>(params.hidden_size, threads);
    launch("moe_permute", &moe_permute_by_token<T, vector.value>, params.num_tokens * blocks_per_token, threads, 0,
           stream, params, static_cast<int>(blocks_per_token));
  });
}

/// The rows of every slot, in ascending order, as lists: first_rows[slot], then next_rows[row] until that is -1. In the
/// workspace of moe_permute_backward.
struct RowLists {
  int32_t* first_rows;         ///< [num_tokens * top_k]; -1 at first
  int32_t* any_slot_repeated;  ///< 1 if a list has more than one row; -1 at first
  int32_t* next_rows;          ///< [num_rows]
};

/// A thread per row, which inserts the row into its slot's list. The list is the same whichever thread comes first.
__global__ void __launch_bounds__(kThreads)
    list_rows_by_slot(const MoePermuteBackwardParams params, const RowLists lists) {
  using Link = ::cuda::atomic_ref<int32_t, ::cuda::thread_scope_device>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= params.num_rows || !does_work(params.last_offset, row))
    return;
  const int32_t slot = params.row_slots[row];
  if (slot < 0 || slot >= params.num_tokens * params.top_k)
    return;
  int32_t* link = &lists.first_rows[slot];
  int32_t next = Link(*link).load(::cuda::memory_order_acquire);
  while (true) {
    if (next >= 0)
      *lists.any_slot_repeated = 1;
    if (next >= 0 && next < row) {
      link = &lists.next_rows[next];
      next = Link(*link).load(::cuda::memory_order_acquire);
      continue;
    }
    lists.next_rows[row] = next;
    if (Link(*link).compare_exchange_strong(next, static_cast<int32_t>(row), ::cuda::memory_order_acq_rel))
      return;
  }
}

/// Sums tokens again that have several rows for one slot, a block per token at a time. No plan has such slots: then the
/// kernel ends at once.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    sum_repeated_slots(const MoePermuteBackwardParams params, const RowLists lists) {
  using A = typename Computed<T>::type;
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (*lists.any_slot_repeated < 0)
    return;
  for (int64_t token = blockIdx.x; token < params.num_tokens; token += gridDim.x) {
    const int32_t* first_rows = lists.first_rows + token * params.top_k;
    for (int64_t column = threadIdx.x; column < params.hidden_size; column += kThreads) {
      A sum = 0;
      for (int64_t k = 0; k < params.top_k; ++k) {
        for (int64_t row = first_rows[k]; row >= 0; row = lists.next_rows[row]) {
          sum += Computed<T>::from(static_cast<const T*>(params.grad_rows)[row * params.grad_rows_row_stride + column]);
        }
      }
      static_cast<T*>(params.grad_hidden_states)[token * params.hidden_size + column] = Computed<T>::to(sum);
    }
  }
}

}  // namespace
}  // namespace cuda

void moe_permute_cuda(const MoePermuteParams& params, cudaStream_t stream) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  switch (params.data_type) {
    case ScalarType::kFloat64: return cuda::launch_moe_permute<uint64_t>(params, stream);
    case ScalarType::kFloat32: return cuda::launch_moe_permute<uint32_t>(params, stream);
    case ScalarType::kBFloat16:
    case ScalarType::kFloat16: return cuda::launch_moe_permute<uint16_t>(params, stream);
    case ScalarType::kInt32:
    case ScalarType::kInt64: break;  // refused by validate()
  }
}

void moe_permute_backward_cuda(const MoePermuteBackwardParams& params, cudaStream_t stream) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  MoeFinalizeParams sums = params.as_moe_finalize();
  if (params.slot_rows != nullptr) {
    moe_finalize_cuda(sums, stream);
    return;
  }
  const char* name = "moe_permute_backward";
  const int64_t num_slots = params.num_tokens * params.top_k;
  auto* first_rows = static_cast<int32_t*>(params.workspace);
  const cuda::RowLists lists{first_rows, first_rows + num_slots, first_rows + num_slots + 1};
  cuda::check(cudaMemsetAsync(first_rows, 0xff, sizeof(int32_t) * static_cast<size_t>(num_slots + 1), stream), name);
  if (params.num_rows > 0) {
    cuda::launch(name, &cuda::list_rows_by_slot, (params.num_rows + cuda::kThreads - 1) / cuda::kThreads,
                 cuda::kThreads, 0, stream, params, lists);
  }
  sums.slot_rows = lists.first_rows;
  moe_finalize_cuda(sums, stream);
  if (params.num_rows > 0) {
    cuda::visit_any_data_type(params.data_type, [&](auto element) {
      cuda::launch(name, &cuda::sum_repeated_slots<decltype(element)>,
                   std::min<int64_t>(params.num_tokens, cuda::num_multiprocessors()), cuda::kThreads, 0, stream, params,
                   lists);
    });
  }
}

}  // namespace zexpert
