// SPDX-License-Identifier: Apache-2.0
#include "zexpert/silu_and_mul.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/types.cuh"
#include "cuda/vector.cuh"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

/// A block per row.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) silu_and_mul(const SiluAndMulParams params) {
  using A = typename Computed<T>::type;
  using Elements = Vector<T, kVector>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t row = blockIdx.x;
  if (!does_work(params.last_offset, row))
    return;
  const int64_t size = params.intermediate_size;
  const T* __restrict__ gates = static_cast<const T*>(params.gate_up) + row * params.gate_up_row_stride;
  T* __restrict__ out = static_cast<T*>(params.out) + row * params.out_row_stride;
#pragma unroll 2
  for (int64_t i = int64_t{threadIdx.x} * kVector; i < size; i += int64_t{blockDim.x} * kVector) {
    Elements gate = *reinterpret_cast<const Elements*>(gates + i);
    const Elements up = *reinterpret_cast<const Elements*>(gates + size + i);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const A x = Computed<T>::from(gate.values[v]);
      gate.values[v] = Computed<T>::to(x / (1 + exponential(-x)) * Computed<T>::from(up.values[v]));
    }
    *reinterpret_cast<Elements*>(out + i) = gate;
  }
}

/// A block per row. kExtras: the params may have out, row_weight and grad_row_weight.
template <typename T, int kVector, bool kExtras>
__global__ void __launch_bounds__(kThreads) silu_and_mul_backward(const SiluAndMulBackwardParams params) {
  using A = typename Computed<T>::type;
  using Elements = Vector<T, kVector>;
  __shared__ A warp_sums[kThreads / kWarpSize];
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t row = blockIdx.x;
  const bool works = does_work(params.last_offset, row);
  const int64_t size = params.intermediate_size;
  const T* gates = static_cast<const T*>(params.gate_up) + row * params.gate_up_row_stride;
  const T* grad_out = static_cast<const T*>(params.grad_out) + row * params.grad_out_row_stride;
  T* grad_gates = static_cast<T*>(params.grad_gate_up) + row * params.grad_gate_up_row_stride;
  T* out =
      kExtras && works && params.out != nullptr ? static_cast<T*>(params.out) + row * params.out_row_stride : nullptr;
  const A weight =
      kExtras && works && params.row_weight != nullptr ? static_cast<const A*>(params.row_weight)[row] : A{1};
  A dot = 0;
  for (int64_t i = int64_t{threadIdx.x} * kVector; i < size; i += int64_t{blockDim.x} * kVector) {
    Elements grad_gate{};
    Elements grad_up{};
    Elements activation{};
    if (works) {
      const Elements gradient = *reinterpret_cast<const Elements*>(grad_out + i);
      const Elements gate = *reinterpret_cast<const Elements*>(gates + i);
      const Elements up = *reinterpret_cast<const Elements*>(gates + size + i);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const A unweighted = Computed<T>::from(gradient.values[v]);
        const A g = kExtras ? weight * unweighted : unweighted;
        const A x = Computed<T>::from(gate.values[v]);
        const A u = Computed<T>::from(up.values[v]);
        const A s = 1 / (1 + exponential(-x));
        grad_gate.values[v] = Computed<T>::to(g * u * s * (1 + x * (1 - s)));
        grad_up.values[v] = Computed<T>::to(g * x * s);
        if (kExtras) {
          const A product = x / (1 + exponential(-x)) * u;  // as the forward computes it, to the last bit
          dot += unweighted * product;
          activation.values[v] = Computed<T>::to(weight * product);
        }
      }
    }
    *reinterpret_cast<Elements*>(grad_gates + i) = grad_gate;
    *reinterpret_cast<Elements*>(grad_gates + size + i) = grad_up;
    if (out != nullptr)
      *reinterpret_cast<Elements*>(out + i) = activation;
  }
  if (kExtras && params.grad_row_weight != nullptr) {
    dot = block_sum(dot, warp_sums);
    if (threadIdx.x == 0)
      static_cast<A*>(params.grad_row_weight)[row] = dot;
  }
}

}  // namespace
}  // namespace cuda

void silu_and_mul_cuda(const SiluAndMulParams& params, cudaStream_t stream) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    using T = decltype(element);
    const bool fits = cuda::fits_vectors(params.gate_up, params.gate_up_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.out, params.out_row_stride, sizeof(T));
    cuda::visit_vector<T>(fits, params.intermediate_size, [&](auto vector) {
      cuda::launch("silu_and_mul", &cuda::silu_and_mul<T, vector.value>, params.num_rows,
                   cuda::threads_for_row<vector.value>(params.intermediate_size, cuda::kThreads), 0, stream, params);
    });
  });
}

void silu_and_mul_backward_cuda(const SiluAndMulBackwardParams& params, cudaStream_t stream) {
  params.validate();
  if (params.is_empty()) {
    return;
  }
  const bool has_extras = params.out != nullptr || params.row_weight != nullptr || params.grad_row_weight != nullptr;
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    using T = decltype(element);
    const bool fits = cuda::fits_vectors(params.grad_out, params.grad_out_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.gate_up, params.gate_up_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.grad_gate_up, params.grad_gate_up_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.out, params.out_row_stride, sizeof(T));
    cuda::visit_vector<T>(fits, params.intermediate_size, [&](auto vector) {
      constexpr int kVector = decltype(vector)::value;
      const auto kernel =
          has_extras ? &cuda::silu_and_mul_backward<T, kVector, true> : &cuda::silu_and_mul_backward<T, kVector, false>;
      cuda::launch("silu_and_mul_backward", kernel, params.num_rows,
                   cuda::threads_for_row<kVector>(params.intermediate_size, cuda::kThreads), 0, stream, params);
    });
  });
}

}  // namespace zexpert
