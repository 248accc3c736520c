// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_finalize.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/element_types.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "cuda/weighted_rows.cuh"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kThreads = 128;

/// How many rows' loads a thread has in flight, and so how many blocks' registers a multiprocessor holds. Where all
/// blocks run at once, latency counts: more rows of few blocks, so that most tokens take one round. Else throughput
/// does: fewer rows of more blocks.
template <bool kAllAtOnce>
struct InFlight {
  static constexpr int kRows = kAllAtOnce ? 12 : 8;
  static constexpr int kBlocksPerMultiprocessor = kAllAtOnce ? 6 : 8;
};

/// A thread per vector of a token's output; the blocks of a token lie side by side.
template <typename T, int kVector, bool kAllAtOnce>
__global__ void __launch_bounds__(kThreads, InFlight<kAllAtOnce>::kBlocksPerMultiprocessor)
    moe_finalize(const MoeFinalizeParams params, const int blocks_per_row) {
  using A = typename Computed<T>::type;
  using Elements = Vector<T, kVector>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const auto [token, column] = own_vector<kVector>(blocks_per_row);
  const bool active = column < params.hidden_size;

  // These loads do not wait for the plan, so they come first.
  const A zero_weight = static_cast<const A*>(params.zero_weight)[token];
  Words<T, kVector> own_words{};
  Words<T, kVector> residual_words{};
  if (active) {
    own_words =
        load_once<T, kVector>(static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride + column);
    if (params.residual != nullptr) {
      residual_words =
          load_once<T, kVector>(static_cast<const T*>(params.residual) + token * params.residual_row_stride + column);
    }
  }
  constexpr int kRowsAtOnce = InFlight<kAllAtOnce>::kRows * int{sizeof(float)} / int{sizeof(A)};
  A sums[kVector] = {};
  add_weighted_rows<T, kVector, kRowsAtOnce>(static_cast<const T*>(params.rows) + column, params.rows_row_stride,
                                             params.num_rows, params.slot_rows + token * params.top_k,
                                             static_cast<const A*>(params.topk_weights) + token * params.top_k,
                                             params.top_k, active, sums);
  if (!active)
    return;
  Elements own = to_vector<T, kVector>(own_words);
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    sums[v] = fma(zero_weight, static_cast<A>(Computed<T>::from(own.values[v])), sums[v]);
  }
  for (int64_t c = 0; c < params.num_constant_experts; ++c) {
    const A weight = static_cast<const A*>(params.constant_weight)[token * params.num_constant_experts + c];
    const Elements constant = *reinterpret_cast<const Elements*>(static_cast<const T*>(params.constant_vectors) +
                                                                 c * params.constant_row_stride + column);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      sums[v] = fma(weight, static_cast<A>(Computed<T>::from(constant.values[v])), sums[v]);
    }
  }
  const Elements residual = to_vector<T, kVector>(residual_words);
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    own.values[v] = Computed<T>::to(sums[v] + static_cast<A>(Computed<T>::from(residual.values[v])));
  }
  store_once<T, kVector>(static_cast<T*>(params.out) + token * params.hidden_size + column, to_words<T, kVector>(own));
}

}  // namespace
}  // namespace cuda

void moe_finalize_cuda(const MoeFinalizeParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.hidden_size == 0) {
    return;
  }
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    using T = decltype(element);
    // Strides of what is absent are 0, and null fits.
    const bool fits = cuda::fits_vectors(params.rows, params.rows_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.hidden_states, params.hidden_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.residual, params.residual_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.constant_vectors, params.constant_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.out, params.hidden_size, sizeof(T));
    cuda::visit_vector<T>(fits, params.hidden_size, [&](auto vector) {
      const int threads = cuda::threads_for_row<vector.value>(params.hidden_size, cuda::kThreads);
      const int64_t blocks_per_row = cuda::blocks_for_row<vector.value>(params.hidden_size, threads);
      const int64_t num_blocks = params.num_tokens * blocks_per_row;
      const bool all_at_once =
          num_blocks <= cuda::num_multiprocessors() * cuda::InFlight<true>::kBlocksPerMultiprocessor;
      const auto kernel =
          all_at_once ? &cuda::moe_finalize<T, vector.value, true> : &cuda::moe_finalize<T, vector.value, false>;
      cuda::launch("moe_finalize", kernel, num_blocks, threads, 0, stream, params, static_cast<int>(blocks_per_row));
    });
  });
}

}  // namespace zexpert
