// SPDX-License-Identifier: Apache-2.0
#include "zexpert/moe_finalize.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"
#include "cuda/vector.cuh"
#include "cuda/weighted_rows.cuh"

namespace zexpert {
namespace cuda {
namespace {

// The sum of a token's rows

constexpr int kThreads = 128;

/// Rows that a thread loads at a time, and blocks whose registers then fit a multiprocessor. If all blocks run at once,
/// latency limits: many rows at a time, so that one round loads most tokens. Otherwise throughput limits: more blocks
/// with fewer rows each.
template <bool kAllAtOnce>
struct InFlight {
  static constexpr int kRows = kAllAtOnce ? 12 : 8;
  static constexpr int kBlocksPerMultiprocessor = kAllAtOnce ? 6 : 8;
};

/// A thread per vector of a token's output; the blocks of a token are next to each other. Without kWeighted,
/// topk_weights is null.
template <typename T, int kVector, bool kAllAtOnce, bool kWeighted>
__global__ void __launch_bounds__(kThreads, InFlight<kAllAtOnce>::kBlocksPerMultiprocessor)
    moe_finalize(const MoeFinalizeParams params, const int blocks_per_row) {
  using A = typename Computed<T>::type;
  using Elements = Vector<T, kVector>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const auto [token, column] = own_vector<kVector>(blocks_per_row);
  const bool active = column < params.hidden_size;

  // Load what does not depend on the plan. What is not given counts as 0.
  const A zero_weight = params.zero_weight != nullptr ? static_cast<const A*>(params.zero_weight)[token] : A{0};
  Words<T, kVector> own_words{};
  Words<T, kVector> residual_words{};
  if (active) {
    if (params.zero_weight != nullptr) {
      own_words = load_once<T, kVector>(static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride +
                                        column);
    }
    if (params.residual != nullptr) {
      residual_words =
          load_once<T, kVector>(static_cast<const T*>(params.residual) + token * params.residual_row_stride + column);
    }
  }

  // Add the rows of the slots.
  constexpr int kRowsAtOnce = InFlight<kAllAtOnce>::kRows * int{sizeof(float)} / int{sizeof(A)};
  A sums[kVector] = {};
  add_weighted_rows<T, kVector, kRowsAtOnce>(
      static_cast<const T*>(params.rows) + column, params.rows_row_stride, params.num_rows,
      params.slot_rows + token * params.top_k,
      kWeighted ? static_cast<const A*>(params.topk_weights) + token * params.top_k : nullptr, params.top_k, active,
      sums);
  if (!active)
    return;

  // Add the zero part, the constants and the residual.
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

  // Write
  store_once<T, kVector>(static_cast<T*>(params.out) + token * params.out_row_stride + column,
                         to_words<T, kVector>(own));
}

template <typename T, int kVector>
void launch_moe_finalize(const MoeFinalizeParams& params, cudaStream_t stream) {
  const int threads = threads_for_row<kVector>(params.hidden_size, kThreads);
  const int64_t blocks_per_row = blocks_for_row<kVector>(params.hidden_size, threads);
  const int64_t num_blocks = params.num_tokens * blocks_per_row;
  const bool all_at_once = num_blocks <= num_multiprocessors() * InFlight<true>::kBlocksPerMultiprocessor;
  const auto kernel = params.topk_weights == nullptr ? &moe_finalize<T, kVector, false, false>
                      : all_at_once                  ? &moe_finalize<T, kVector, true, true>
                                                     : &moe_finalize<T, kVector, false, true>;
  launch("moe_finalize", kernel, num_blocks, threads, 0, stream, params, static_cast<int>(blocks_per_row));
}

// The zero part alone

constexpr int kScaleThreads = 256;
constexpr int kVectorsPerThread = 2;

/// out = zero_weight * hidden_states, added to the residual if kAdds. A block per run of columns of a token.
template <typename T, int kVector, bool kAdds>
__global__ void __launch_bounds__(kScaleThreads)
    scale_hidden_states(const MoeFinalizeParams params, const int64_t blocks_per_row) {
  using A = typename Computed<T>::type;
  using Elements = Vector<T, kVector>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t token = blockIdx.x / blocks_per_row;
  const int64_t first = (blockIdx.x % blocks_per_row * kVectorsPerThread * kScaleThreads + threadIdx.x) * kVector;
  const T* source = static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride;
  const T* residual = static_cast<const T*>(params.residual) + token * params.residual_row_stride;
  T* out = static_cast<T*>(params.out) + token * params.out_row_stride;
  const A weight = static_cast<const A*>(params.zero_weight)[token];
#pragma unroll
  for (int i = 0; i < kVectorsPerThread; ++i) {
    const int64_t column = first + static_cast<int64_t>(i) * kScaleThreads * kVector;
    if (column >= params.hidden_size)
      break;
    Elements elements = *reinterpret_cast<const Elements*>(source + column);
    Elements addends;
    if (kAdds)
      addends = *reinterpret_cast<const Elements*>(residual + column);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      A value = weight * Computed<T>::from(elements.values[v]);
      if (kAdds)
        value += Computed<T>::from(addends.values[v]);
      elements.values[v] = Computed<T>::to(value);
    }
    *reinterpret_cast<Elements*>(out + column) = elements;
  }
}

template <typename T, int kVector>
void launch_scale_hidden_states(const MoeFinalizeParams& params, cudaStream_t stream) {
  const int64_t blocks_per_row = blocks_for_row<kVector * kVectorsPerThread>(params.hidden_size, kScaleThreads);
  const auto kernel =
      params.residual != nullptr ? &scale_hidden_states<T, kVector, true> : &scale_hidden_states<T, kVector, false>;
  launch("moe_finalize", kernel, params.num_tokens * blocks_per_row, kScaleThreads, 0, stream, params, blocks_per_row);
}

// Gradients

constexpr int kMaxWarps = 8;
constexpr int kBackwardThreads = kMaxWarps * kWarpSize;

/// Returns this thread's part of <gradient, row>; if kScales, also target = weight * gradient in the same pass.
/// `num_threads` threads share the row, and this one has number `thread`. Each thread keeps several sums: no load waits
/// for an addition, and rounding errors stay small.
template <bool kScales, typename T, int kVector, typename A>
__device__ __forceinline__ A scale_and_dot(const T* __restrict__ gradient, A weight, const T* __restrict__ row,
                                           int64_t size, T* __restrict__ target, int thread, int num_threads) {
  constexpr int kSums = 8;
  constexpr int kSteps = kSums / kVector;
  using Elements = Vector<T, kVector>;
  const int64_t stride = int64_t{num_threads} * kVector;
  A sums[kSums] = {};
  for (int64_t first = int64_t{thread} * kVector; first < size; first += kSteps * stride) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int64_t i = first + step * stride;
      if (i < size) {
        Elements gradients = *reinterpret_cast<const Elements*>(gradient + i);
        const Elements elements = *reinterpret_cast<const Elements*>(row + i);
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const A g = Computed<T>::from(gradients.values[v]);
          A& sum = sums[step * kVector + v];
          sum = fma(g, static_cast<A>(Computed<T>::from(elements.values[v])), sum);
          if constexpr (kScales)
            gradients.values[v] = Computed<T>::to(weight * g);
        }
        if constexpr (kScales)
          *reinterpret_cast<Elements*>(target + i) = gradients;
      }
    }
  }
#pragma unroll
  for (int half = kSums / 2; half > 0; half /= 2) {
#pragma unroll
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  }
  return sums[0];
}

/// The thread's part of the gradient of the token's zero_weight; writes the gradient of its hidden_states if wanted.
template <typename T, int kVector>
__device__ __forceinline__ typename Computed<T>::type differentiate_zero_part(const MoeFinalizeBackwardParams& params,
                                                                              int64_t token, int thread,
                                                                              int num_threads) {
  using A = typename Computed<T>::type;
  const int64_t size = params.hidden_size;
  const T* grad_out = static_cast<const T*>(params.grad_out) + token * params.grad_out_row_stride;
  const T* hidden_states = static_cast<const T*>(params.hidden_states) + token * params.hidden_row_stride;
  if (params.grad_hidden_states == nullptr) {
    return scale_and_dot<false, T, kVector>(grad_out, A{0}, hidden_states, size, static_cast<T*>(nullptr), thread,
                                            num_threads);
  }
  return scale_and_dot<true, T, kVector>(grad_out, static_cast<const A*>(params.zero_weight)[token], hidden_states,
                                         size, static_cast<T*>(params.grad_hidden_states) + token * size, thread,
                                         num_threads);
}

/// A block per token, a warp per slot and one for the zero part. The warps share the token's grad_out in the cache.
template <typename T, int kVector>
__global__ void __launch_bounds__(kBackwardThreads) moe_finalize_backward(const MoeFinalizeBackwardParams params) {
  using A = typename Computed<T>::type;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t token = blockIdx.x;
  const auto lane = static_cast<int>(threadIdx.x % kWarpSize);
  const int64_t size = params.hidden_size;
  const T* grad_out = static_cast<const T*>(params.grad_out) + token * params.grad_out_row_stride;
  for (int64_t k = threadIdx.x / kWarpSize; k <= params.top_k; k += blockDim.x / kWarpSize) {
    if (k == params.top_k) {
      const A dot = warp_sum(differentiate_zero_part<T, kVector>(params, token, lane, kWarpSize));
      if (lane == 0)
        static_cast<A*>(params.grad_zero_weight)[token] = dot;
      return;
    }
    const int64_t slot = token * params.top_k + k;
    const int64_t row = params.slot_rows[slot];
    A dot = 0;
    if (row >= 0 && row < params.num_rows) {
      dot = warp_sum(scale_and_dot<true, T, kVector>(grad_out, static_cast<const A*>(params.topk_weights)[slot],
                                                     static_cast<const T*>(params.rows) + row * params.rows_row_stride,
                                                     size, static_cast<T*>(params.grad_rows) + row * size, lane,
                                                     kWarpSize));
      if (lane == 0)
        static_cast<uint8_t*>(params.workspace)[row] = 1;
    }
    if (lane == 0)
      static_cast<A*>(params.grad_topk_weights)[slot] = dot;
  }
}

/// Without slots: a block per token for the zero part.
template <typename T, int kVector>
__global__ void __launch_bounds__(kBackwardThreads)
    moe_finalize_backward_without_slots(const MoeFinalizeBackwardParams params) {
  using A = typename Computed<T>::type;
  __shared__ A scratch[kMaxWarps];
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t token = blockIdx.x;
  const A dot = block_sum(
      differentiate_zero_part<T, kVector>(params, token, static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x)),
      scratch);
  if (threadIdx.x == 0)
    static_cast<A*>(params.grad_zero_weight)[token] = dot;
}

/// A block per row. A byte of the workspace says whether the row has a slot.
template <typename T, int kVector>
__global__ void __launch_bounds__(kBackwardThreads) zero_rows_without_slot(const MoeFinalizeBackwardParams params) {
  using Elements = Vector<T, kVector>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  if (static_cast<const uint8_t*>(params.workspace)[blockIdx.x] != 0)
    return;
  T* row = static_cast<T*>(params.grad_rows) + blockIdx.x * params.hidden_size;
  for (int64_t i = int64_t{threadIdx.x} * kVector; i < params.hidden_size; i += int64_t{blockDim.x} * kVector) {
    *reinterpret_cast<Elements*>(row + i) = Elements{};
  }
}

template <typename T, int kVector>
void launch_moe_finalize_backward(const MoeFinalizeBackwardParams& params, cudaStream_t stream) {
  const char* name = "moe_finalize_backward";
  const int threads_of_row = threads_for_row<kVector>(params.hidden_size, kBackwardThreads);
  if (params.num_rows > 0) {
    check(cudaMemsetAsync(params.workspace, 0, static_cast<size_t>(params.num_rows), stream), name);
  }
  if (params.num_tokens > 0 && params.top_k > 0) {
    const auto warps = static_cast<int>(std::min<int64_t>(params.top_k + 1, kMaxWarps));
    launch(name, &moe_finalize_backward<T, kVector>, params.num_tokens, warps * kWarpSize, 0, stream, params);
  } else if (params.num_tokens > 0) {
    launch(name, &moe_finalize_backward_without_slots<T, kVector>, params.num_tokens, threads_of_row, 0, stream,
           params);
  }
  if (params.num_rows > 0 && params.hidden_size > 0) {
    launch(name, &zero_rows_without_slot<T, kVector>, params.num_rows, threads_of_row, 0, stream, params);
  }
}

}  // namespace
}  // namespace cuda

void moe_finalize_cuda(const MoeFinalizeParams& params, cudaStream_t stream) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    using T = decltype(element);
    // Null pointers fit, and so do the strides of arrays that are not given if they are 0.
    const bool fits = cuda::fits_vectors(params.rows, params.rows_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.hidden_states, params.hidden_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.residual, params.residual_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.constant_vectors, params.constant_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.out, params.out_row_stride, sizeof(T));
    cuda::visit_vector<T>(fits, params.hidden_size, [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      params.is_zero_part_alone() ? cuda::launch_scale_hidden_states<T, kVector>(params, stream)
                                  : cuda::launch_moe_finalize<T, kVector>(params, stream);
    });
  });
}

void moe_finalize_backward_cuda(const MoeFinalizeBackwardParams& params, cudaStream_t stream) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    using T = decltype(element);
    const bool fits = cuda::fits_vectors(params.grad_out, params.grad_out_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.rows, params.rows_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.hidden_states, params.hidden_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.grad_rows, params.hidden_size, sizeof(T)) &&
                      cuda::fits_vectors(params.grad_hidden_states, params.hidden_size, sizeof(T));
    cuda::visit_vector<T>(fits, params.hidden_size, [&](auto vector) {
      cuda::launch_moe_finalize_backward<T, decltype(vector)::value>(params, stream);
    });
  });
}

}  // namespace zexpert
