// SPDX-License-Identifier: Apache-2.0
// silu_and_mul and its backward.
#include "zexpert/silu_and_mul.h"

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/element_types.cuh"
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"
#include "zexpert/error.h"
#include "zexpert/silu_and_mul_backward.h"

namespace zexpert {
namespace cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

/// A block per row.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) silu_and_mul(const SiluAndMulParams params, const int32_t* last_offset) {
  using A = typename Computed<T>::type;
  using Elements = Vector<T, kVector>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t row = blockIdx.x;
  if (last_offset != nullptr && row >= *last_offset)
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

/// A block per row; rows past the last offset become 0.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads)
    silu_and_mul_backward(const SiluAndMulBackwardParams params, const int32_t* last_offset) {
  using A = typename Computed<T>::type;
  using Elements = Vector<T, kVector>;
  wait_for_previous_kernels();
  let_next_kernel_start();
  const int64_t row = blockIdx.x;
  const bool works = last_offset == nullptr || row < *last_offset;
  const int64_t size = params.intermediate_size;
  const T* gates = static_cast<const T*>(params.gate_up) + row * params.gate_up_row_stride;
  const T* grad_out = static_cast<const T*>(params.grad_out) + row * params.grad_out_row_stride;
  T* grad_gates = static_cast<T*>(params.grad_gate_up) + row * params.grad_gate_up_row_stride;
  for (int64_t i = int64_t{threadIdx.x} * kVector; i < size; i += int64_t{blockDim.x} * kVector) {
    Elements grad_gate{};
    Elements grad_up{};
    if (works) {
      const Elements gradient = *reinterpret_cast<const Elements*>(grad_out + i);
      const Elements gate = *reinterpret_cast<const Elements*>(gates + i);
      const Elements up = *reinterpret_cast<const Elements*>(gates + size + i);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const A g = Computed<T>::from(gradient.values[v]);
        const A x = Computed<T>::from(gate.values[v]);
        const A s = 1 / (1 + exponential(-x));
        grad_gate.values[v] = Computed<T>::to(g * Computed<T>::from(up.values[v]) * s * (1 + x * (1 - s)));
        grad_up.values[v] = Computed<T>::to(g * x * s);
      }
    }
    *reinterpret_cast<Elements*>(grad_gates + i) = grad_gate;
    *reinterpret_cast<Elements*>(grad_gates + size + i) = grad_up;
  }
}

}  // namespace
}  // namespace cuda

void silu_and_mul_cuda(const SiluAndMulParams& params, const int32_t* last_offset, cudaStream_t stream) {
  if (params.num_rows == 0 || params.intermediate_size == 0) {
    return;
  }
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    using T = decltype(element);
    const bool fits = cuda::fits_vectors(params.gate_up, params.gate_up_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.out, params.out_row_stride, sizeof(T));
    cuda::visit_vector<T>(fits, params.intermediate_size, [&](auto vector) {
      cuda::launch("silu_and_mul", &cuda::silu_and_mul<T, vector.value>, params.num_rows,
                   cuda::threads_for_row<vector.value>(params.intermediate_size, cuda::kThreads), 0, stream, params,
                   last_offset);
    });
  });
}

void silu_and_mul_backward_cuda(const SiluAndMulBackwardParams& params, const int32_t* last_offset,
                                cudaStream_t stream) {
  ZEXPERT_CHECK(params.out == nullptr && params.row_weight == nullptr && params.grad_row_weight == nullptr,
                "silu_and_mul_backward_cuda takes neither out nor row weights");
  if (params.num_rows == 0 || params.intermediate_size == 0) {
    return;
  }
  cuda::visit_any_data_type(params.data_type, [&](auto element) {
    using T = decltype(element);
    const bool fits = cuda::fits_vectors(params.grad_out, params.grad_out_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.gate_up, params.gate_up_row_stride, sizeof(T)) &&
                      cuda::fits_vectors(params.grad_gate_up, params.grad_gate_up_row_stride, sizeof(T));
    cuda::visit_vector<T>(fits, params.intermediate_size, [&](auto vector) {
      cuda::launch("silu_and_mul_backward", &cuda::silu_and_mul_backward<T, vector.value>, params.num_rows,
                   cuda::threads_for_row<vector.value>(params.intermediate_size, cuda::kThreads), 0, stream, params,
                   last_offset);
    });
  });
}

}  // namespace zexpert
